// What the ARM kernels share: how sums of integers become those of rows, how a group is walked, and the quantization of
// activations. A register is 4 rows × 4 columns, a quarter of a chunk.
//
// Each way to hold tokens (TOKENS) brings `sums`, which multiplies a square in integers, and what is done with floats
// by the scales of its activations; sum I of N low and N high ones is of `R` quarters of the rows and `T` tokens. All
// do the same to a row:
//
//     without smaller scales   row += float(Σ w q) · (scale · d), and with a minimum row -= minimum · (-Σ q · d)
//     with them, 256 columns   block += float(Σ smaller · Σ w q) · d, least += smaller minimum · (-Σ q · d) for each
//                              square; then row += block · scale, row += least · minimum
//
// each of them fused, so that a token has the same bits alone and among others.

#pragma once

#include "arm/weights.h"

#include <cstring>

namespace mobilellm {

namespace {

// The block of weights against which the first or the second block of a pair of activations stands.
template <ggml_type TYPE>
MOBILELLM_INLINE const uint8_t * block_of(const uint8_t * pair, bool second) {
    return pair + (second && form_of(TYPE).columns == 32 ? block_bytes(form_of(TYPE)) : 0);
}

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

// A value of each of 4 R low rows, and of the high ones.
template <class V, int R>
struct of_rows {
    V low[R];
    V high[R];
};

// Fp16 numbers of the rows from quarter r on; `halves` has those of all rows.
template <int R>
MOBILELLM_INLINE of_rows<float32x4_t, R> halves_of(const uint8_t * halves, int r) {
    of_rows<float32x4_t, R> x;
    if constexpr (R == QUARTERS) {
        uint8x16_t s[4];
        load_two<0>(halves, s[0], s[1]);
        load_two<32>(halves, s[2], s[3]);
        each<2>(MOBILELLM_EACH {
            const float16x8_t l = vreinterpretq_f16_u8(s[i]);
            const float16x8_t h = vreinterpretq_f16_u8(s[2 + i]);
            x.low[2 * i]        = vcvt_f32_f16(vget_low_f16(l));
            x.low[2 * i + 1]    = vcvt_high_f32_f16(l);
            x.high[2 * i]       = vcvt_f32_f16(vget_low_f16(h));
            x.high[2 * i + 1]   = vcvt_high_f32_f16(h);
        });
    } else {
        each<R>(MOBILELLM_EACH {
            x.low[i]  = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves + 8 * (r + i))));
            x.high[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves + 8 * (r + i) + 32)));
        });
    }
    return x;
}

// Numbers of the rows from quarter r on; `numbers` has a byte of each row.
template <int R>
MOBILELLM_INLINE of_rows<int32x4_t, R> numbers_of(const int8_t * numbers, int r) {
    of_rows<int32x4_t, R> x;
    const auto            widen = [&](const int8_t * from, int32x4_t * to) __attribute__((always_inline)) {
        if constexpr (R == 1) {
            int32_t four;
            std::memcpy(&four, from, sizeof(four));
            to[0] = vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
        } else {
            for (int i = 0; i < R; i += 2) {
                const int16x8_t eight = vmovl_s8(vld1_s8(from + 4 * i));
                to[i]                 = vmovl_s16(vget_low_s16(eight));
                to[i + 1]             = vmovl_high_s16(eight);
            }
        }
    };
    widen(numbers + 4 * r, x.low);
    widen(numbers + 16 + 4 * r, x.high);
    return x;
}

template <class TOKENS>
using float_sums = of_rows<float32x4_t, TOKENS::N>;

template <class TOKENS>
using integer_sums = of_rows<int32x4_t, TOKENS::N>;

// Σ w q of the high rows as float, from sums of what their bytes hold.
template <ggml_type TYPE, class TOKENS>
MOBILELLM_INLINE float32x4_t high_of(int32x4_t low, int32x4_t high) {
    if constexpr (TOKENS::BOTH && shared_bits<TYPE>() > 0) {
        return vcvtq_n_f32_s32(vsubq_s32(high, low), shared_bits<TYPE>());
    } else {
        return vcvtq_f32_s32(high);
    }
}

// Adds a square to R quarters of the rows from quarter r on; types without smaller scales.
template <ggml_type TYPE, bool SECOND, class TOKENS>
MOBILELLM_INLINE void add_square(const uint8_t * block, int r, const TOKENS & a, float_sums<TOKENS> & to) {
    constexpr form F = form_of(TYPE);
    int32x4_t      low[TOKENS::N];
    int32x4_t      high[TOKENS::N];
    a.template sums<TYPE, SECOND, 0, 4>(block + header_bytes(F) + quarter_bytes<TYPE>() * r, low, high);
    const auto scale = halves_of<TOKENS::R>(block, r);
    each<TOKENS::N>([&](auto i_) __attribute__((always_inline)) {
        constexpr int i = i_;
        to.low[i]       = vfmaq_f32(to.low[i], vcvtq_f32_s32(low[i]), a.template by_scale<i, SECOND>(scale.low));
        to.high[i] =
            vfmaq_f32(to.high[i], high_of<TYPE, TOKENS>(low[i], high[i]), a.template by_scale<i, SECOND>(scale.high));
    });
    if constexpr (F.halves == 2) {
        const auto least = halves_of<TOKENS::R>(block + 64, r);
        each<TOKENS::N>([&](auto i_) __attribute__((always_inline)) {
            constexpr int i = i_;
            to.low[i]       = a.template take_sum<i, SECOND>(to.low[i], least.low);
            to.high[i]      = a.template take_sum<i, SECOND>(to.high[i], least.high);
        });
    }
}

// Adds a square of a block with smaller scales, whose quants of this part begin at `quants`; they are not yet
// multiplied by the block's scale.
template <ggml_type TYPE, bool SECOND, class TOKENS>
MOBILELLM_INLINE void add_scaled_square(const uint8_t * quants, const int8_t * smaller, int r, const TOKENS & a,
                                        float_sums<TOKENS> & to) {
    constexpr form       F     = form_of(TYPE);
    constexpr int        SPANS = BLOCK / F.scaled;
    integer_sums<TOKENS> all;
    each<SPANS>([&](auto span_) __attribute__((always_inline)) {
        constexpr int span = span_;
        constexpr int K    = 4 / SPANS;
        int32x4_t     low[TOKENS::N];
        int32x4_t     high[TOKENS::N];
        a.template sums<TYPE, SECOND, K * span, K>(quants + quarter_bytes<TYPE>() * r, low, high);
        const auto scale = numbers_of<TOKENS::R>(smaller + 32 * (SPANS * SECOND + span), r);
        each<TOKENS::N>([&](auto i_) __attribute__((always_inline)) {
            constexpr int   i   = i_;
            const int32x4_t own = TOKENS::BOTH && shared_bits<TYPE>() > 0 ? vsubq_s32(high[i], low[i]) : high[i];
            const int32x4_t l   = TOKENS::template rows<i>(scale.low);
            const int32x4_t h   = TOKENS::template rows<i>(scale.high);
            all.low[i]          = span ? vmlaq_s32(all.low[i], low[i], l) : vmulq_s32(low[i], l);
            all.high[i]         = span ? vmlaq_s32(all.high[i], own, h) : vmulq_s32(own, h);
        });
    });
    each<TOKENS::N>([&](auto i_) __attribute__((always_inline)) {
        constexpr int i      = i_;
        constexpr int shared = TOKENS::BOTH ? shared_bits<TYPE>() : 0;
        to.low[i]            = a.template add_scaled<i, SECOND>(to.low[i], vcvtq_f32_s32(all.low[i]));
        if constexpr (shared > 0) {
            to.high[i] = a.template add_scaled<i, SECOND>(to.high[i], vcvtq_n_f32_s32(all.high[i], shared));
        } else {
            to.high[i] = a.template add_scaled<i, SECOND>(to.high[i], vcvtq_f32_s32(all.high[i]));
        }
    });
}

// All of a group, R quarters from quarter r on; types without smaller scales.
template <ggml_type TYPE, class TOKENS>
__attribute__((noinline)) void add_group(const part & p, int r, const uint8_t * q, size_t q_size, float * y,
                                         int64_t stride) {
    TOKENS             a(q, q_size);
    float_sums<TOKENS> sums;
    each<TOKENS::N>(MOBILELLM_EACH { sums.low[i] = sums.high[i] = vdupq_n_f32(0.0f); });
    each_pair<TYPE>(p, r == 0 && fetches(p), [&](const uint8_t * pair) __attribute__((always_inline)) {
        add_square<TYPE, false>(block_of<TYPE>(pair, false), r, a, sums);
        add_square<TYPE, true>(block_of<TYPE>(pair, true), r, a, sums);
        a.advance();
    });
    TOKENS::store(sums.low, y + 4 * r, stride);
    TOKENS::store(sums.high, y + 16 + 4 * r, stride);
}

// A block with smaller scales.
template <ggml_type TYPE, class TOKENS>
__attribute__((noinline)) void add_block(const uint8_t * block, const int8_t * smaller, int r, const uint8_t * q,
                                         size_t q_size, float_sums<TOKENS> & to) {
    constexpr form     F     = form_of(TYPE);
    constexpr int      PAIRS = F.columns / 64;
    TOKENS             a(q, q_size);
    float_sums<TOKENS> sums;
    const auto         add = [&](const uint8_t * halves) __attribute__((always_inline)) {
        const auto half = halves_of<TOKENS::R>(halves, r);
        each<TOKENS::N>([&](auto i_) __attribute__((always_inline)) {
            constexpr int i = i_;
            to.low[i]       = vfmaq_f32(to.low[i], sums.low[i], TOKENS::template rows<i>(half.low));
            to.high[i]      = vfmaq_f32(to.high[i], sums.high[i], TOKENS::template rows<i>(half.high));
        });
    };
    const auto clear = [&]() __attribute__((always_inline)) {
        each<TOKENS::N>(MOBILELLM_EACH { sums.low[i] = sums.high[i] = vdupq_n_f32(0.0f); });
    };
    clear();
    for (int pair = 0; pair < PAIRS; ++pair) {
        constexpr int   parts  = 64 / part_columns(F);
        const uint8_t * quants = block + header_bytes(F) + parts * pair * part_bytes(F);
        const int8_t *  scales = smaller + 32 * (64 / F.scaled) * pair;
        add_scaled_square<TYPE, false>(quants, scales, r, a, sums);
        add_scaled_square<TYPE, true>(quants + (parts - 1) * part_bytes(F), scales, r, a, sums);
        a.advance();
    }
    add(block);
    if constexpr (F.halves == 2) {
        TOKENS         b(q, q_size);
        const int8_t * least = smaller + 32 * (F.columns / F.scaled);
        clear();
        for (int pair = 0; pair < PAIRS; ++pair, least += 64) {
            each<2>([&](auto second_) __attribute__((always_inline)) {
                constexpr int                   second  = second_;
                const auto                      numbers = numbers_of<TOKENS::R>(least + 32 * second, r);
                of_rows<float32x4_t, TOKENS::R> x;
                each<TOKENS::R>(MOBILELLM_EACH {
                    x.low[i]  = vcvtq_f32_s32(numbers.low[i]);
                    x.high[i] = vcvtq_f32_s32(numbers.high[i]);
                });
                each<TOKENS::N>([&](auto i_) __attribute__((always_inline)) {
                    constexpr int i = i_;
                    sums.low[i]     = b.template add_sum<i, second>(sums.low[i], x.low);
                    sums.high[i]    = b.template add_sum<i, second>(sums.high[i], x.high);
                });
            });
            b.advance();
        }
        add(block + 64);
    }
}

// A group times the tokens of TOKENS; their rows of y are `stride` apart.
template <ggml_type TYPE, class TOKENS>
MOBILELLM_INLINE void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
    constexpr form F = form_of(TYPE);
    float          all[TOKENS::T * GROUP];  // where not all of them are wanted
    float * const  out  = rows == GROUP ? y : all;
    const int64_t  step = rows == GROUP ? stride : GROUP;
    if constexpr (F.subs == 0) {
        for (int r = 0; r < QUARTERS; r += TOKENS::R) {
            add_group<TYPE, TOKENS>(p, r, q, q_size, out, step);
        }
    } else {
        constexpr int      PAIRS = F.columns / 64;
        float_sums<TOKENS> sums[QUARTERS / TOKENS::R];
        for (auto & of : sums) {
            each<TOKENS::N>(MOBILELLM_EACH { of.low[i] = of.high[i] = vdupq_n_f32(0.0f); });
        }
        const uint8_t * block = p.data;
        for (int64_t i = 0; i < p.n_pairs; i += PAIRS, block += PAIRS * pair_bytes<TYPE>()) {
            for (int pair = 0; fetches(p) && pair < PAIRS; ++pair) {
                prefetch<TYPE>(p, i + pair);
            }
            alignas(64) int8_t memory[32 * MAX_SUBS];
            const int8_t *     smaller = smaller_scales<TYPE>(block + 64 * F.halves, memory);
            for (int r = 0; r < QUARTERS; r += TOKENS::R) {
                add_block<TYPE, TOKENS>(block, smaller, r, q, q_size, sums[r / TOKENS::R]);
            }
            q += 2 * PAIRS * TOKENS::BYTES;
        }
        for (int r = 0; r < QUARTERS; r += TOKENS::R) {
            TOKENS::store(sums[r / TOKENS::R].low, out + 4 * r, step);
            TOKENS::store(sums[r / TOKENS::R].high, out + 16 + 4 * r, step);
        }
    }
    for (int t = 0; rows != GROUP && t < TOKENS::T; ++t) {
        std::memcpy(y + t * stride, all + t * GROUP, rows * sizeof(float));
    }
}

// Tokens as they are quantized, each for itself; sum R t + r is of token t.
template <int TOKENS, int QUARTERS_AT_ONCE>
struct plain_tokens {
    static constexpr int T     = TOKENS;
    static constexpr int R     = QUARTERS_AT_ONCE;
    static constexpr int N     = T * R;
    static constexpr int BYTES = sizeof(activations);

    MOBILELLM_INLINE plain_tokens(const uint8_t * q, size_t q_size) {
        each<T>(MOBILELLM_EACH { a[i] = reinterpret_cast<const activations *>(q + i * q_size); });
    }

    MOBILELLM_INLINE void advance() {
        each<T>(MOBILELLM_EACH { a[i] += 2; });
    }

    // What of rows stands against sum I.
    template <int I, class V>
    static MOBILELLM_INLINE V rows(const V (&x)[R]) {
        return x[I % R];
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t by_scale(const float32x4_t (&x)[R]) const {
        return vmulq_n_f32(x[I % R], a[I / R][SECOND].d);
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t add_scaled(float32x4_t to, float32x4_t x) const {
        return vfmaq_n_f32(to, x, a[I / R][SECOND].d);
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t add_sum(float32x4_t to, const float32x4_t (&x)[R]) const {
        return vfmaq_n_f32(to, x[I % R], float(a[I / R][SECOND].minus_sum) * a[I / R][SECOND].d);
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t take_sum(float32x4_t to, const float32x4_t (&x)[R]) const {
        return vfmsq_n_f32(to, x[I % R], float(a[I / R][SECOND].minus_sum) * a[I / R][SECOND].d);
    }

    static MOBILELLM_INLINE void store(const float32x4_t (&sums)[N], float * y, int64_t stride) {
        each<N>(MOBILELLM_EACH { vst1q_f32(y + i / R * stride + 4 * (i % R), sums[i]); });
    }

    const activations * a[T];
};

// -OFFSET Σ q of the columns of a block that share a scale.
template <int OFFSET, int SCALED, int SPAN>
MOBILELLM_INLINE int32x4_t offset_of(const activations & a) {
    if constexpr (OFFSET == 0) {
        return vdupq_n_s32(0);
    } else if constexpr (SCALED < BLOCK) {
        return vmulq_n_s32(vdupq_n_s32(SPAN ? a.minus_sum - a.minus_first_sum : a.minus_first_sum), OFFSET);
    } else if constexpr (OFFSET == 8) {
        return vld1q_dup_s32(&a.minus_8_sum);
    } else {
        return vmulq_n_s32(vld1q_dup_s32(&a.minus_sum), OFFSET);
    }
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
        const int32_t first_sum = vaddlvq_s8(first);
        const int32_t sum       = first_sum + vaddlvq_s8(second);
        out->minus_sum          = -sum;
        out->minus_8_sum        = -8 * sum;
        out->minus_first_sum    = -first_sum;
    }
}

}  // namespace

}  // namespace mobilellm
