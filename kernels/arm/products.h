// What the ARM kernels share: how weights are taken out of their bytes, what becomes of a block's sums, and the
// quantization of activations. A register is 4 rows × 4 columns, a
// quarter of a chunk.
//
// A block adds float(Σ w q) · (scale · d) to a row, fused; the kernels of one and of several tokens do the same, so
// that a token has the same bits in both.

#pragma once

#include "tiles.h"

#include <arm_neon.h>

#include <cstring>
#include <utility>

namespace mobilellm {

namespace {

constexpr int     QUARTERS = 4;          // of the 16 rows of a chunk
constexpr int64_t SCALES   = GROUP * 2;  // bytes, at the beginning of a block of a group

// The block of weights against which the first or the second block of a pair of activations stands.
template <ggml_type TYPE>
MOBILELLM_INLINE const uint8_t * block_of(const uint8_t * pair, bool second) {
    return pair + (second && TYPE != GGML_TYPE_Q2_0 ? pair_bytes<TYPE>() / 2 : 0);
}

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

// f(pair) for the data of each pair of blocks of a group, what comes later being fetched if wanted.
template <ggml_type TYPE, class F>
MOBILELLM_INLINE void each_pair(const part & p, bool fetch, F f) {
    const uint8_t * const end = p.data + p.n_pairs * pair_bytes<TYPE>();
    for (const uint8_t * pair = p.data; pair != end; pair += pair_bytes<TYPE>()) {
        if (__builtin_expect(fetch, false)) {
            prefetch<TYPE>(p, (pair - p.data) / pair_bytes<TYPE>());
        }
        f(pair);
    }
}

// 32 bytes from `from` + OFFSET on into two registers by one instruction, which compilers seldom find by themselves.
template <int OFFSET>
MOBILELLM_INLINE void load_two(const uint8_t * from, uint8x16_t & a, uint8x16_t & b) {
    using bytes = const uint8_t[OFFSET + 32];
    __asm__("ldp %q0, %q1, [%2, %3]"
            : "=w"(a), "=w"(b)
            : "r"(from), "n"(OFFSET), "m"(*reinterpret_cast<bytes *>(from)));
}

// The scales of four neighbouring rows.
MOBILELLM_INLINE float32x4_t scales_at(const uint8_t * scales) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(scales)));
}

// The scales of all rows of a block, times d: four quarters of the low rows, and of the high ones.
struct all_scales {
    float32x4_t low[QUARTERS];
    float32x4_t high[QUARTERS];

    MOBILELLM_INLINE all_scales(const uint8_t * scales, float d) {
        uint8x16_t s[4];
        load_two<0>(scales, s[0], s[1]);
        load_two<32>(scales, s[2], s[3]);
        each<2>(MOBILELLM_EACH {
            const float16x8_t l = vreinterpretq_f16_u8(s[i]);
            const float16x8_t h = vreinterpretq_f16_u8(s[2 + i]);
            low[2 * i]          = vmulq_n_f32(vcvt_f32_f16(vget_low_f16(l)), d);
            low[2 * i + 1]      = vmulq_n_f32(vcvt_high_f32_f16(l), d);
            high[2 * i]         = vmulq_n_f32(vcvt_f32_f16(vget_low_f16(h)), d);
            high[2 * i + 1]     = vmulq_n_f32(vcvt_high_f32_f16(h), d);
        });
    }
};

// Bytes of a quarter of the rows in a block.
template <ggml_type TYPE>
constexpr int quarter_bytes() {
    return TYPE == GGML_TYPE_Q8_0 ? 256 : 128;
}

// n where bytes of two rows are low + 2^n high.
template <ggml_type TYPE>
constexpr int shared_bits() {
    return TYPE == GGML_TYPE_Q4_0 ? 4 : TYPE == GGML_TYPE_Q2_0 ? 2 : 0;
}

struct pair_of_rows {
    int8x16_t low;
    int8x16_t both;  // low + 2^n high, Q8_0: high
};

// Of what was read from a chunk; Q8_0: `x` for the low rows, `z` for the high ones.
template <ggml_type TYPE>
MOBILELLM_INLINE pair_of_rows weights_of(uint8x16_t x, uint8x16_t z, bool second) {
    if constexpr (TYPE == GGML_TYPE_Q8_0) {
        return { vreinterpretq_s8_u8(x), vreinterpretq_s8_u8(z) };
    } else if constexpr (TYPE == GGML_TYPE_Q4_0) {
        return { vreinterpretq_s8_u8(vandq_u8(x, vdupq_n_u8(15))), vreinterpretq_s8_u8(x) };
    } else {
        const uint8x16_t both = second ? vshrq_n_u8(x, 4) : vandq_u8(x, vdupq_n_u8(15));
        return { vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(3))), vreinterpretq_s8_u8(both) };
    }
}

// Of chunks 2 K and 2 K + 1 of the quarter that begins AT bytes further on.
template <ggml_type TYPE, int K, int AT = 0>
MOBILELLM_INLINE void weights_at(const uint8_t * quarter, bool second, pair_of_rows (&w)[2]) {
    uint8x16_t x[2];
    uint8x16_t z[2] = {};
    if constexpr (TYPE == GGML_TYPE_Q8_0) {
        load_two<AT + 64 * K>(quarter, x[0], z[0]);
        load_two<AT + 64 * K + 32>(quarter, x[1], z[1]);
    } else {
        load_two<AT + 32 * K>(quarter, x[0], x[1]);
    }
    w[0] = weights_of<TYPE>(x[0], z[0], second);
    w[1] = weights_of<TYPE>(x[1], z[1], second);
}

// The high rows' own weights where they are not what `both` holds; without an offset in Q4_0.
template <ggml_type TYPE>
MOBILELLM_INLINE int8x16_t high_weights(const pair_of_rows & w) {
    return TYPE == GGML_TYPE_Q8_0 ? w.both : vshrq_n_s8(w.both, shared_bits<TYPE>());
}

// What takes back the offset of the weights, from the sums of the low rows and the high ones'.
template <ggml_type TYPE>
MOBILELLM_INLINE int32_t low_offset(const activations & a) {
    return TYPE == GGML_TYPE_Q4_0 ? a.minus_8_sum : TYPE == GGML_TYPE_Q2_0 ? a.minus_sum : 0;
}

template <ggml_type TYPE>
MOBILELLM_INLINE int32_t high_offset(const activations & a) {
    return TYPE == GGML_TYPE_Q2_0 ? a.minus_sum : 0;
}

void quantize(const float * x, int64_t n_cols, activations * out) {
    for (int64_t b = 0; b < n_cols / BLOCK; ++b, x += BLOCK, ++out) {
        float32x4_t v[8];
        uint32x4_t  sizes = vdupq_n_u32(0);
        for (int i = 0; i < 8; ++i) {
            v[i]  = vld1q_f32(x + 4 * i);
            sizes = vmaxq_u32(sizes, vreinterpretq_u32_f32(vabsq_f32(v[i])));
        }
        // magnitudes compare as integers, infinities and NaNs above all others
        const uint32_t size   = vmaxvq_u32(sizes);
        const bool     finite = size < 0x7F800000;
        float          largest;
        std::memcpy(&largest, &size, sizeof(largest));

        int8x16_t first  = vdupq_n_s8(0);
        int8x16_t second = vdupq_n_s8(0);
        out->d           = finite ? 0.0f : __builtin_nanf("");
        if (finite && largest >= 1e-30f) {
            const float factor = 127.0f / largest;
            int32x4_t   n[8];
            for (int i = 0; i < 8; ++i) {
                n[i] = vcvtnq_s32_f32(vmulq_n_f32(v[i], factor));
            }
            const auto words = [&](int i) {
                return vuzp1q_s16(vreinterpretq_s16_s32(n[i]), vreinterpretq_s16_s32(n[i + 1]));
            };
            const auto bytes = [&](int i) {
                return vuzp1q_s8(vreinterpretq_s8_s16(words(i)), vreinterpretq_s8_s16(words(i + 2)));
            };
            first  = bytes(0);
            second = bytes(4);
            out->d = largest / 127.0f;
        }
        vst1q_s8(out->q, first);
        vst1q_s8(out->q + 16, second);
        set_sum(*out, vaddlvq_s16(vpadalq_s8(vpaddlq_s8(first), second)));
    }
}

// Rows of a group to y, as many as there are.
MOBILELLM_INLINE void store_rows(const float * sums, float * y, int64_t rows) {
    if (rows == GROUP) {
        std::memcpy(y, sums, GROUP * sizeof(float));
    } else {
        std::memcpy(y, sums, rows * sizeof(float));
    }
}

}  // namespace

}  // namespace mobilellm
