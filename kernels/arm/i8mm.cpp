// Processors that multiply matrices of bytes (Neoverse V1, Apple M2, Cortex-X2 and later): SMMLA takes 2 rows × 8
// columns of weights and 2 tokens at once. One token alone is SDOT's.

#include "arm/dot_rows.h"

namespace mobilellm {

namespace {

// A block of two pairs of tokens: 8 columns of both tokens of a pair, first those of pair 0 and 1, then the next 8.
struct two_pairs {
    int8_t  q[4][2][16];
    float   d[2][4];  // as the sums lie
    int32_t minus_sum[2][4];
};

// From two registers of 4 rows × 4 columns: 8 columns of the first two rows, and of the others.
MOBILELLM_INLINE int8x16_t first_rows(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

MOBILELLM_INLINE int8x16_t other_rows(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

// P pairs of tokens, 4 low and 4 high rows, in two pairs: a block. Sums are, lane by lane, of a pair's first row by
// both tokens and of its second by both; sum[2 i + k] of pair of tokens i and pair of rows k.
template <ggml_type TYPE, int P, int SECOND>
MOBILELLM_INLINE void matrix_block(const uint8_t * scales, const uint8_t * quarter, const two_pairs & a,
                                   float32x4_t (&low_sum)[2 * P], float32x4_t (&high_sum)[2 * P]) {
    int32x4_t low[2 * P];
    int32x4_t both[2 * P];
    each<2 * P>(MOBILELLM_EACH {
        if constexpr (TYPE == GGML_TYPE_Q8_0) {
            low[i] = both[i] = vdupq_n_s32(0);
        } else {
            const int32x4_t minus_sum = vld1q_s32(a.minus_sum[i / 2]);
            low[i]                    = TYPE == GGML_TYPE_Q4_0 ? vshlq_n_s32(minus_sum, 3) : minus_sum;
            both[i]                   = TYPE == GGML_TYPE_Q4_0 ? low[i] : vmulq_n_s32(minus_sum, 5);
        }
    });
    each<4>([&](auto k_) __attribute__((always_inline)) {
        constexpr int k = k_;
        uint8x16_t    q[2];
        uint8x16_t    x[2];
        pair_of_rows  w[2];
        load_two<32 * k>(reinterpret_cast<const uint8_t *>(a.q), q[0], q[1]);
        if constexpr (TYPE == GGML_TYPE_Q8_0) {
            weights_at<TYPE, k>(quarter, SECOND, w);
            const pair_of_rows v[2] = { w[0], w[1] };
            w[0]                    = { first_rows(v[0].low, v[1].low), first_rows(v[0].both, v[1].both) };
            w[1]                    = { other_rows(v[0].low, v[1].low), other_rows(v[0].both, v[1].both) };
        } else {
            load_two<32 * k>(quarter, x[0], x[1]);
            const int8x16_t v[2] = { vreinterpretq_s8_u8(x[0]), vreinterpretq_s8_u8(x[1]) };
            w[0]                 = weights_of<TYPE>(vreinterpretq_u8_s8(first_rows(v[0], v[1])), x[0], SECOND);
            w[1]                 = weights_of<TYPE>(vreinterpretq_u8_s8(other_rows(v[0], v[1])), x[0], SECOND);
        }
        each<2 * P>(MOBILELLM_EACH {
            low[i]  = vmmlaq_s32(low[i], w[i % 2].low, vreinterpretq_s8_u8(q[i / 2]));
            both[i] = vmmlaq_s32(both[i], w[i % 2].both, vreinterpretq_s8_u8(q[i / 2]));
        });
    });
    const float32x4_t l             = scales_at(scales);
    const float32x4_t h             = scales_at(scales + 32);
    const float32x4_t low_scale[2]  = { vzip1q_f32(l, l), vzip2q_f32(l, l) };
    const float32x4_t high_scale[2] = { vzip1q_f32(h, h), vzip2q_f32(h, h) };
    float32x4_t       d[P];
    each<P>(MOBILELLM_EACH { d[i] = vld1q_f32(a.d[i]); });
    each<2 * P>(MOBILELLM_EACH {
        low_sum[i]  = vfmaq_f32(low_sum[i], vcvtq_f32_s32(low[i]), vmulq_f32(low_scale[i % 2], d[i / 2]));
        high_sum[i] = add_high<TYPE>(high_sum[i], low[i], both[i], vmulq_f32(high_scale[i % 2], d[i / 2]));
    });
}

struct i8mm_isa {
    static constexpr int TILE     = 4;
    static constexpr int ARRANGED = sizeof(two_pairs);

    static void arrange(const uint8_t * q, size_t q_size, int64_t n_blocks, uint8_t * out) {
        for (int64_t b = 0; b < n_blocks; ++b, out += sizeof(two_pairs)) {
            auto & to = *reinterpret_cast<two_pairs *>(out);
            for (int t = 0; t < 4; ++t) {
                const auto & a = reinterpret_cast<const activations *>(q + t * q_size)[b];
                for (int k = 0; k < 4; ++k) {
                    std::memcpy(to.q[k][t / 2] + 8 * (t % 2), a.q + 8 * k, 8);
                }
                to.d[t / 2][t % 2] = to.d[t / 2][2 + t % 2] = a.d;
                to.minus_sum[t / 2][t % 2] = to.minus_sum[t / 2][2 + t % 2] = a.minus_sum;
            }
        }
    }

    template <ggml_type TYPE>
    static __attribute__((noinline)) void arranged_rows(const part & p, int r, const two_pairs * a, float (*y)[GROUP]) {
        float32x4_t low[4];
        float32x4_t high[4];
        each<4>(MOBILELLM_EACH { low[i] = high[i] = vdupq_n_f32(0.0f); });
        each_pair<TYPE>(p, r == 0 && fetches(p), [&](const uint8_t * pair) __attribute__((always_inline)) {
            const uint8_t * second  = block_of<TYPE>(pair, true);
            const int       quarter = SCALES + quarter_bytes<TYPE>() * r;
            matrix_block<TYPE, 2, 0>(pair + 8 * r, pair + quarter, a[0], low, high);
            matrix_block<TYPE, 2, 1>(second + 8 * r, second + quarter, a[1], low, high);
            a += 2;
        });
        each<2>(MOBILELLM_EACH {
            vst1q_f32(y[2 * i] + 4 * r, vuzp1q_f32(low[2 * i], low[2 * i + 1]));
            vst1q_f32(y[2 * i + 1] + 4 * r, vuzp2q_f32(low[2 * i], low[2 * i + 1]));
            vst1q_f32(y[2 * i] + 16 + 4 * r, vuzp1q_f32(high[2 * i], high[2 * i + 1]));
            vst1q_f32(y[2 * i + 1] + 16 + 4 * r, vuzp2q_f32(high[2 * i], high[2 * i + 1]));
        });
    }

    template <ggml_type TYPE>
    static void arranged_tile(const part & p, const uint8_t * q, float * y, int64_t stride, int64_t rows) {
        float sums[4][GROUP];
        for (int r = 0; r < QUARTERS; ++r) {
            arranged_rows<TYPE>(p, r, reinterpret_cast<const two_pairs *>(q), sums);
        }
        for (int t = 0; t < 4; ++t) {
            store_rows(sums[t], y + t * stride, rows);
        }
    }

    // Fewer tokens than a tile.
    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        dot_tile<TYPE, T>(p, q, q_size, y, stride, rows);
    }
};

}  // namespace

extern const kernels i8mm_kernels;
const kernels        i8mm_kernels = { quantize, matmul<i8mm_isa> };

}  // namespace mobilellm
