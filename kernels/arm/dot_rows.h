// Products by SDOT (ARMv8.2's dot products): 4 rows × 4 columns of weights by 4 activations out of a lane.

#pragma once

#include "arm/products.h"

namespace mobilellm {

namespace {

// Where the sums of the low rows start, and those of `both`: the low ones are subtracted from these.
template <ggml_type TYPE>
MOBILELLM_INLINE void start(const activations & a, int32x4_t & low, int32x4_t & both) {
    if constexpr (TYPE == GGML_TYPE_Q4_0) {
        low = both = vld1q_dup_s32(&a.minus_8_sum);
    } else if constexpr (TYPE == GGML_TYPE_Q2_0) {
        low  = vld1q_dup_s32(&a.minus_sum);
        both = vmulq_n_s32(low, 5);
    } else {
        low = both = vdupq_n_s32(0);
    }
}

// sum += Σ w q · scale · d of the high rows.
template <ggml_type TYPE>
MOBILELLM_INLINE float32x4_t add_high(float32x4_t sum, int32x4_t low, int32x4_t both, float32x4_t scale) {
    constexpr int shift = shared_bits<TYPE>();
    if constexpr (shift > 0) {
        return vfmaq_f32(sum, vcvtq_n_f32_s32(vsubq_s32(both, low), shift), scale);
    } else {
        return vfmaq_f32(sum, vcvtq_f32_s32(both), scale);
    }
}

// One token, all 32 rows: a block.
template <ggml_type TYPE, int SECOND>
MOBILELLM_INLINE void dot_block(const uint8_t * pair, const activations & a, float32x4_t (&low_sum)[QUARTERS],
                                float32x4_t (&high_sum)[QUARTERS]) {
    const uint8_t * scales = block_of<TYPE>(pair, SECOND);
    const uint8_t * quants = scales + SCALES;
    const int8x16_t a0     = vld1q_s8(a.q);
    const int8x16_t a1     = vld1q_s8(a.q + 16);
    int32x4_t       low[QUARTERS];
    int32x4_t       both[QUARTERS];
    each<QUARTERS>(MOBILELLM_EACH { start<TYPE>(a, low[i], both[i]); });
    each<4 * QUARTERS>(MOBILELLM_EACH {
        constexpr int k = i % 4;
        constexpr int r = i / 4;
        pair_of_rows  w[2];
        weights_at<TYPE, k, quarter_bytes<TYPE>() * r>(quants, SECOND, w);
        each<2>([&](auto n_) __attribute__((always_inline)) {
            constexpr int n = n_;
            constexpr int c = 2 * k + n;
            low[r]          = vdotq_laneq_s32(low[r], w[n].low, c < 4 ? a0 : a1, c % 4);
            both[r]         = vdotq_laneq_s32(both[r], w[n].both, c < 4 ? a0 : a1, c % 4);
        });
    });
    const all_scales by(scales, a.d);
    each<QUARTERS>(MOBILELLM_EACH {
        low_sum[i]  = vfmaq_f32(low_sum[i], vcvtq_f32_s32(low[i]), by.low[i]);
        high_sum[i] = add_high<TYPE>(high_sum[i], low[i], both[i], by.high[i]);
    });
}

template <ggml_type TYPE>
__attribute__((noinline)) void dot_one(const part & p, const uint8_t * q, float * y, int64_t rows) {
    float32x4_t low[QUARTERS];
    float32x4_t high[QUARTERS];
    each<QUARTERS>(MOBILELLM_EACH { low[i] = high[i] = vdupq_n_f32(0.0f); });

    const auto * a = reinterpret_cast<const activations *>(q);
    each_pair<TYPE>(p, fetches(p), [&](const uint8_t * pair) __attribute__((always_inline)) {
        dot_block<TYPE, 0>(pair, a[0], low, high);
        dot_block<TYPE, 1>(pair, a[1], low, high);
        a += 2;
    });
    float sums[GROUP];
    each<QUARTERS>(MOBILELLM_EACH {
        vst1q_f32(sums + 4 * i, low[i]);
        vst1q_f32(sums + 16 + 4 * i, high[i]);
    });
    store_rows(sums, y, rows);
}

// T tokens, 4 low and 4 high rows: a block.
template <ggml_type TYPE, int T, int SECOND>
MOBILELLM_INLINE void dot_block(const uint8_t * scales, const activations * const (&a)[T], float32x4_t (&low_sum)[T],
                                float32x4_t (&high_sum)[T], const uint8_t * quarter) {
    int32x4_t low[T];
    int32x4_t both[T];
    int8x16_t q[T];
    each<T>(MOBILELLM_EACH { start<TYPE>(a[i][SECOND], low[i], both[i]); });
    each<4>([&](auto k_) __attribute__((always_inline)) {
        constexpr int k = k_;
        if constexpr (k % 2 == 0) {
            each<T>(MOBILELLM_EACH { q[i] = vld1q_s8(a[i][SECOND].q + 8 * k); });
        }
        pair_of_rows w[2];
        weights_at<TYPE, k>(quarter, SECOND, w);
        each<2 * T>(MOBILELLM_EACH {
            constexpr int n = i / T;
            constexpr int t = i % T;
            low[t]          = vdotq_laneq_s32(low[t], w[n].low, q[t], (2 * k + n) % 4);
            both[t]         = vdotq_laneq_s32(both[t], w[n].both, q[t], (2 * k + n) % 4);
        });
    });
    const float32x4_t low_scale  = scales_at(scales);
    const float32x4_t high_scale = scales_at(scales + 32);
    each<T>(MOBILELLM_EACH {
        const float d = a[i][SECOND].d;
        low_sum[i]    = vfmaq_f32(low_sum[i], vcvtq_f32_s32(low[i]), vmulq_n_f32(low_scale, d));
        high_sum[i]   = add_high<TYPE>(high_sum[i], low[i], both[i], vmulq_n_f32(high_scale, d));
    });
}

template <ggml_type TYPE, int T>
__attribute__((noinline)) void dot_rows(const part & p, int r, const uint8_t * q, size_t q_size, float (*y)[GROUP]) {
    float32x4_t         low[T];
    float32x4_t         high[T];
    const activations * a[T];
    each<T>(MOBILELLM_EACH {
        low[i] = high[i] = vdupq_n_f32(0.0f);
        a[i]             = reinterpret_cast<const activations *>(q + i * q_size);
    });
    each_pair<TYPE>(p, r == 0 && fetches(p), [&](const uint8_t * pair) __attribute__((always_inline)) {
        const uint8_t * second = block_of<TYPE>(pair, true);
        dot_block<TYPE, T, 0>(pair + 8 * r, a, low, high, pair + SCALES + quarter_bytes<TYPE>() * r);
        dot_block<TYPE, T, 1>(second + 8 * r, a, low, high, second + SCALES + quarter_bytes<TYPE>() * r);
        each<T>(MOBILELLM_EACH { a[i] += 2; });
    });
    each<T>(MOBILELLM_EACH {
        vst1q_f32(y[i] + 4 * r, low[i]);
        vst1q_f32(y[i] + 16 + 4 * r, high[i]);
    });
}

template <ggml_type TYPE, int T>
MOBILELLM_INLINE void dot_tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride,
                               int64_t rows) {
    if constexpr (T == 1) {
        dot_one<TYPE>(p, q, y, rows);
    } else {
        float sums[T][GROUP];
        for (int r = 0; r < QUARTERS; ++r) {
            dot_rows<TYPE, T>(p, r, q, q_size, sums);
        }
        for (int t = 0; t < T; ++t) {
            store_rows(sums[t], y + t * stride, rows);
        }
    }
}

}  // namespace

}  // namespace mobilellm
