// Products by SDOT (ARMv8.2's dot products): 4 rows × 4 columns of weights by 4 activations out of a lane.

#pragma once

#include "arm/products.h"

namespace mobilellm {

namespace {

// Where sums of what the high rows' bytes hold start, from where those of the low rows do and -Σ q.
template <ggml_type TYPE>
constexpr int both_offset() {
    return low_offset<TYPE>() + ((1 << shared_bits<TYPE>()) - (shared_bits<TYPE>() == 0)) * high_offset<TYPE>();
}

template <int T, int R>
struct dot_tokens : plain_tokens<T, R> {
    using plain_tokens<T, R>::plain_tokens;

    static constexpr bool BOTH = true;

    // Of chunks 2 K0 to 2 (K0 + KS) - 1.
    template <ggml_type TYPE, bool SECOND, int K0, int KS>
    MOBILELLM_INLINE void sums(const uint8_t * quarters, int32x4_t (&low_sum)[T * R],
                               int32x4_t (&high_sum)[T * R]) const {
        constexpr int scaled = form_of(TYPE).scaled;
        int8x16_t     q[T];
        each<T * R>(MOBILELLM_EACH {
            const activations & a = this->a[i / R][SECOND];
            low_sum[i]            = offset_of<low_offset<TYPE>(), scaled, (K0 > 0)>(a);
            high_sum[i]           = offset_of<both_offset<TYPE>(), scaled, (K0 > 0)>(a);
        });
        each<R * KS>([&](auto step_) __attribute__((always_inline)) {
            constexpr int    r = step_ / KS;
            constexpr int    k = K0 + step_ % KS;
            const raw_chunks x = load<TYPE, SECOND, k, quarter_bytes<TYPE>() * r>(quarters);
            if constexpr (k % 2 == 0) {
                each<T>(MOBILELLM_EACH { q[i] = vld1q_s8(this->a[i][SECOND].q + 8 * k); });
            }
            each<2>([&](auto n_) __attribute__((always_inline)) {
                constexpr int   n    = n_;
                constexpr int   lane = (2 * k + n) % 4;
                const int8x16_t low  = weights_of<TYPE, SECOND, false, 2 * k + n>(x);
                const int8x16_t both = both_of<TYPE, SECOND, 2 * k + n>(x);
                each<T>(MOBILELLM_EACH {
                    low_sum[R * i + r]  = vdotq_laneq_s32(low_sum[R * i + r], low, q[i], lane);
                    high_sum[R * i + r] = vdotq_laneq_s32(high_sum[R * i + r], both, q[i], lane);
                });
            });
        });
    }
};

// As many quarters at once as registers allow.
template <ggml_type TYPE, int T>
MOBILELLM_INLINE void dot_tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride,
                               int64_t rows) {
    tile<TYPE, dot_tokens<T, T == 1 ? QUARTERS : 1>>(p, q, q_size, y, stride, rows);
}

}  // namespace

}  // namespace mobilellm
