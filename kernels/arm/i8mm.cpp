// Processors that multiply matrices of bytes (Neoverse V1, Apple M2, Cortex-X2 and later): SMMLA takes 2 rows × 8
// columns of weights and 2 tokens at once. One token alone is SDOT's.

#include "arm/dot_rows.h"

namespace mobilellm {

namespace {

// From two registers of 4 rows × 4 columns: 8 columns of the first two rows, and of the others.
struct eight_columns {
    int8x16_t rows[2];

    MOBILELLM_INLINE eight_columns(int8x16_t a, int8x16_t b) :
        rows{ vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b))),
              vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b))) } {}
};

// P pairs of tokens, 4 low and 4 high rows, in two pairs: a block. Sums are, lane by lane, of a pair's first row by
// both tokens and of its second by both; sum[2 i + k] of pair of tokens i and pair of rows k.
template <ggml_type TYPE, int P, int SECOND>
MOBILELLM_INLINE void matrix_block(const uint8_t * scales, const uint8_t * quants,
                                   const activations * const (&a)[2 * P], float32x4_t (&low_sum)[2 * P],
                                   float32x4_t (&high_sum)[2 * P]) {
    int32x4_t low[2 * P];
    int32x4_t both[2 * P];
    each<P>(MOBILELLM_EACH {
        int32x4_t one[2];
        int32x4_t two[2];
        start<TYPE>(a[2 * i][SECOND], one[0], one[1]);
        start<TYPE>(a[2 * i + 1][SECOND], two[0], two[1]);
        low[2 * i] = low[2 * i + 1] = vzip1q_s32(one[0], two[0]);
        both[2 * i] = both[2 * i + 1] = TYPE == GGML_TYPE_Q2_0 ? vzip1q_s32(one[1], two[1]) : low[2 * i];
    });
    int8x16_t q[2 * P];  // 8 columns of both tokens of a pair, and the next 8
    each<4>([&](auto c) __attribute__((always_inline)) {
        if constexpr (c % 2 == 0) {
            each<P>(MOBILELLM_EACH {
                const int64x2_t x = vreinterpretq_s64_s8(vld1q_s8(a[2 * i][SECOND].q + 8 * c));
                const int64x2_t z = vreinterpretq_s64_s8(vld1q_s8(a[2 * i + 1][SECOND].q + 8 * c));
                q[2 * i]          = vreinterpretq_s8_s64(vzip1q_s64(x, z));
                q[2 * i + 1]      = vreinterpretq_s8_s64(vzip2q_s64(x, z));
            });
        }
        const uint8_t *     chunk = quants + 2 * chunk_bytes<TYPE>() * c;
        const pair_of_rows  w     = weights_at<TYPE>(chunk, SECOND);
        const pair_of_rows  v     = weights_at<TYPE>(chunk + chunk_bytes<TYPE>(), SECOND);
        const eight_columns l(w.low, v.low);
        const eight_columns b(w.both, v.both);
        each<2 * P>(MOBILELLM_EACH {
            constexpr int pair = i / 2 * 2;
            low[i]             = vmmlaq_s32(low[i], l.rows[i % 2], q[pair + decltype(c)::value % 2]);
            both[i]            = vmmlaq_s32(both[i], b.rows[i % 2], q[pair + decltype(c)::value % 2]);
        });
    });
    const float32x4_t l             = scales_at(scales);
    const float32x4_t h             = scales_at(scales + 32);
    const float32x4_t low_scale[2]  = { vzip1q_f32(l, l), vzip2q_f32(l, l) };
    const float32x4_t high_scale[2] = { vzip1q_f32(h, h), vzip2q_f32(h, h) };
    float32x4_t       d[P];
    each<P>(MOBILELLM_EACH {
        d[i] = vzip1q_f32(vld1q_dup_f32(&a[2 * i][SECOND].d), vld1q_dup_f32(&a[2 * i + 1][SECOND].d));
    });
    each<2 * P>(MOBILELLM_EACH {
        low_sum[i]  = vfmaq_f32(low_sum[i], vcvtq_f32_s32(low[i]), vmulq_f32(low_scale[i % 2], d[i / 2]));
        high_sum[i] = add_high<TYPE>(high_sum[i], low[i], both[i], vmulq_f32(high_scale[i % 2], d[i / 2]));
    });
}

// T tokens, where that is odd the last one twice.
template <ggml_type TYPE, int T>
__attribute__((noinline)) void matrix_rows(const part & p, int r, const uint8_t * q, size_t q_size, float (*y)[GROUP]) {
    constexpr int       P = (T + 1) / 2;
    float32x4_t         low[2 * P];
    float32x4_t         high[2 * P];
    const activations * a[2 * P];
    each<2 * P>(MOBILELLM_EACH {
        low[i] = high[i] = vdupq_n_f32(0.0f);
        a[i]             = reinterpret_cast<const activations *>(q + (i < T ? i : T - 1) * q_size);
    });
    each_pair<TYPE>(p, r == 0 && fetches(p), [&](const uint8_t * pair) __attribute__((always_inline)) {
        const uint8_t * second = block_of<TYPE>(pair, true);
        matrix_block<TYPE, P, 0>(pair + 8 * r, pair + SCALES + 16 * r, a, low, high);
        matrix_block<TYPE, P, 1>(second + 8 * r, second + SCALES + 16 * r, a, low, high);
        each<2 * P>(MOBILELLM_EACH { a[i] += 2; });
    });
    each<P>(MOBILELLM_EACH {
        float * const y0 = y[2 * i] + 4 * r;
        vst1q_f32(y0, vuzp1q_f32(low[2 * i], low[2 * i + 1]));
        vst1q_f32(y0 + 16, vuzp1q_f32(high[2 * i], high[2 * i + 1]));
        if constexpr (2 * i + 1 < T) {
            float * const y1 = y[2 * i + 1] + 4 * r;
            vst1q_f32(y1, vuzp2q_f32(low[2 * i], low[2 * i + 1]));
            vst1q_f32(y1 + 16, vuzp2q_f32(high[2 * i], high[2 * i + 1]));
        }
    });
}

struct i8mm_isa {
    static constexpr int TILE = 4;

    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        if constexpr (T == 1) {
            dot_one<TYPE>(p, q, y, rows);
        } else {
            float sums[T][GROUP];
            for (int r = 0; r < QUARTERS; ++r) {
                matrix_rows<TYPE, T>(p, r, q, q_size, sums);
            }
            for (int t = 0; t < T; ++t) {
                store_rows(sums[t], y + t * stride, rows);
            }
        }
    }
};

}  // namespace

extern const kernels i8mm_kernels;
const kernels        i8mm_kernels = { quantize, matmul<i8mm_isa> };

}  // namespace mobilellm
