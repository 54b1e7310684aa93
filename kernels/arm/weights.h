// How ARM's kernels take weights out of their bytes: two chunks of a quarter of the rows at once, 4 rows × 4 columns a
// register. packing.cpp puts all chunks of a quarter of a part one after the other, plane by plane.

#pragma once

#include "tiles.h"

#include <arm_neon.h>

#include <utility>

namespace mobilellm {

namespace {

constexpr int QUARTERS = 4;  // of the 16 rows of a chunk

// f(0) ... f(N - 1) with numbers that are constants to the compiler: arrays indexed by them stay in registers, which
// GCC does not achieve for loops that it unrolls.
template <int N>
struct number {
    static constexpr int value = N;

    constexpr operator int() const { return N; }
};

template <class F, int... I>
MOBILELLM_INLINE void each(F f, std::integer_sequence<int, I...>) {
    (f(number<I>()), ...);
}

template <int N, class F>
MOBILELLM_INLINE void each(F f) {
    each(f, std::make_integer_sequence<int, N>());
}

#define MOBILELLM_EACH [&](auto i) __attribute__((always_inline))

// 32 bytes from `from` + OFFSET on into two registers by one instruction, which compilers seldom find by themselves.
template <int OFFSET>
MOBILELLM_INLINE void load_two(const uint8_t * from, uint8x16_t & a, uint8x16_t & b) {
    using bytes        = const uint8_t[OFFSET + 32];
    constexpr int base = OFFSET <= 992 ? 0 : OFFSET / 512 * 512;  // the instruction reaches 1008
    uint8x16_t    first;  // not a and b: what they refer to would not be kept in registers
    uint8x16_t    second;
    __asm__("ldp %q0, %q1, [%2, %3]"
            : "=w"(first), "=w"(second)
            : "r"(from + base), "n"(OFFSET - base), "m"(*reinterpret_cast<bytes *>(from)));
    a = first;
    b = second;
}

// Bytes of a quarter of the rows in a part.
template <ggml_type TYPE>
constexpr int quarter_bytes() {
    return part_bytes(form_of(TYPE)) / QUARTERS;
}

// n where bytes of two rows are low + 2^n high, else 0.
template <ggml_type TYPE>
constexpr int shared_bits() {
    constexpr form F = form_of(TYPE);
    return !F.table && (F.bits == 4 || F.bits == 2) ? F.bits : 0;
}

// What the sums of low weights, and of high ones, start at: so many times -Σ q. Where bytes are shared and have
// HIGH_SIGN the high quants are less by 8 than the low ones. Values of a table have their sign.
template <ggml_type TYPE>
constexpr int low_offset() {
    constexpr form F = form_of(TYPE);
    return F.table || F.bits == 8 ? 0 : F.offset;
}

template <ggml_type TYPE>
constexpr int high_offset() {
    return high_sign<TYPE>() ? low_offset<TYPE>() - 8 : low_offset<TYPE>();
}

// The largest magnitude of what is multiplied.
template <ggml_type TYPE>
constexpr int largest_weight() {
    constexpr form F = form_of(TYPE);
    return F.table || F.bits == 8 ? 128 : (1 << F.bits) - 1;
}

// Bytes of two chunks as they lie.
struct raw_chunks {
    uint8x16_t fours[2];   // or bytes of low rows, or of both
    uint8x16_t eights[2];  // of high rows
    uint8x16_t twos[2];    // or the rests of both chunks
    uint8x16_t ones[2];    // of low and of high rows, eight chunks each
};

// Chunks 2 K and 2 K + 1 of a square, the second of 64 columns where its part is shared, of the quarter that begins AT
// bytes further on.
template <ggml_type TYPE, bool SECOND, int K, int AT>
MOBILELLM_INLINE raw_chunks load(const uint8_t * quarter) {
    constexpr form F      = form_of(TYPE);
    constexpr bool second = SECOND && F.columns > 32;
    raw_chunks     x;
    if constexpr (has_rest(F)) {
        load_two<AT + 16 * chunk_of_bytes(F, 2 * K)>(quarter, x.fours[0], x.fours[1]);
        x.twos[0] = vld1q_u8(quarter + AT + 16 * chunk_of_rests(F, 2 * K));
    }
    if constexpr (F.bits == 8) {
        load_two<AT + 64 * K>(quarter, x.fours[0], x.eights[0]);
        load_two<AT + 64 * K + 32>(quarter, x.fours[1], x.eights[1]);
    }
    if constexpr (has_plane(F, 4)) {
        load_two<AT + plane_at(F, 4) / 4 + 32 * K + 128 * second>(quarter, x.fours[0], x.fours[1]);
    }
    if constexpr (has_plane(F, 2)) {
        load_two<AT + plane_at(F, 2) / 4 + 32 * K>(quarter, x.twos[0], x.twos[1]);
    }
    if constexpr (has_plane(F, 1)) {
        // the same for four K, which compilers see by themselves
        x.ones[0] = vld1q_u8(quarter + AT + plane_at(F, 1) / 4 + 32 * second);
        x.ones[1] = vld1q_u8(quarter + AT + plane_at(F, 1) / 4 + 32 * second + 16);
    }
    return x;
}

// Bits of each byte moved from bit FROM to bit TO; what comes with them is to be masked.
template <int FROM, int TO>
MOBILELLM_INLINE uint8x16_t moved(uint8x16_t x) {
    if constexpr (FROM > TO) {
        return vshrq_n_u8(x, FROM - TO);
    } else if constexpr (FROM < TO) {
        return vshlq_n_u8(x, TO - FROM);
    } else {
        return x;
    }
}

// Weights of chunk I of a square, one of the two that were read, of the low or the high rows.
template <ggml_type TYPE, bool SECOND, bool HIGH, int I>
MOBILELLM_INLINE int8x16_t weights_of(const raw_chunks & x) {
    constexpr form F      = form_of(TYPE);
    constexpr int  N      = I % 2;
    constexpr int  second = SECOND && F.columns > 32;
    uint8x16_t     q;
    if constexpr (has_rest(F) && HIGH) {
        constexpr int    rest = rest_bits(F);  // what the register has above them is overwritten
        const uint8x16_t own  = moved<I * rest % 8, 0>(x.twos[0]);
        q                     = vsliq_n_u8(own, vshrq_n_u8(x.fours[N], F.bits), rest);  // a macro in clang: no commas
    } else if constexpr (has_rest(F)) {
        q = vandq_u8(x.fours[N], vdupq_n_u8((1 << F.bits) - 1));
    } else if constexpr (F.bits == 8) {
        q = HIGH ? x.eights[N] : x.fours[N];
    } else if constexpr (HIGH && high_sign<TYPE>()) {
        return vshrq_n_s8(vreinterpretq_s8_u8(x.fours[N]), 4);
    } else if constexpr (has_plane(F, 4)) {
        q = HIGH ? vshrq_n_u8(x.fours[N], 4) : vandq_u8(x.fours[N], vdupq_n_u8(15));
    }
    if constexpr (has_plane(F, 2)) {
        constexpr int from = 4 * second + 2 * HIGH;
        constexpr int to   = plane_bit(F, 2);
        const auto    pair = moved<from, to>(x.twos[N]);
        if constexpr (to > 0) {
            q = vbslq_u8(vdupq_n_u8(3 << to), pair, q);
        } else {
            q = from == 6 ? pair : vandq_u8(pair, vdupq_n_u8(3));
        }
    }
    if constexpr (has_plane(F, 1)) {
        constexpr int to = plane_bit(F, 1);
        q                = vbslq_u8(vdupq_n_u8(1 << to), moved<I, to>(x.ones[HIGH]), q);
    }
    if constexpr (F.table) {
        q = vqtbl1q_u8(veorq_u8(vld1q_u8(TABLE), vdupq_n_u8(128)), q);
    }
    return vreinterpretq_s8_u8(q);
}

// low + 2^n high where rows share bytes, else the high rows' own.
template <ggml_type TYPE, bool SECOND, int I>
MOBILELLM_INLINE int8x16_t both_of(const raw_chunks & x) {
    if constexpr (shared_bits<TYPE>() == 4) {
        return vreinterpretq_s8_u8(x.fours[I % 2]);
    } else if constexpr (shared_bits<TYPE>() == 2) {
        return vreinterpretq_s8_u8(SECOND ? vshrq_n_u8(x.twos[I % 2], 4) : vandq_u8(x.twos[I % 2], vdupq_n_u8(15)));
    } else {
        return weights_of<TYPE, SECOND, true, I>(x);
    }
}

}  // namespace

}  // namespace mobilellm
