// Processors with dot products, from Cortex-A55 and A76 on (Raspberry Pi 5).

#include "arm/dot_rows.h"

namespace mobilellm {

namespace {

// A block of four tokens: the columns of chunk c, token by token, at 16 c.
struct four_tokens {
    int8_t  q[8 * 16];
    float   d[4];
    int32_t offset[4][2];  // of the low and of the shared sums' start, by type: see start()
};

// Four low and four high rows: a block.
template <ggml_type TYPE, int SECOND>
MOBILELLM_INLINE void dot_four(const uint8_t * scales, const uint8_t * quarter, const four_tokens & a,
                               float32x4_t (&low_sum)[4], float32x4_t (&high_sum)[4]) {
    int32x4_t low[4];
    int32x4_t both[4];
    each<4>(MOBILELLM_EACH {
        if constexpr (TYPE == GGML_TYPE_Q8_0) {
            low[i] = both[i] = vdupq_n_s32(0);
        } else {
            low[i]  = vld1q_dup_s32(&a.offset[i][TYPE == GGML_TYPE_Q2_0]);
            both[i] = TYPE == GGML_TYPE_Q2_0 ? vmulq_n_s32(low[i], 5) : low[i];
        }
    });
    each<4>([&](auto k_) __attribute__((always_inline)) {
        constexpr int k = k_;
        pair_of_rows  w[2];
        uint8x16_t    q[2];
        weights_at<TYPE, k>(quarter, SECOND, w);
        load_two<32 * k>(reinterpret_cast<const uint8_t *>(a.q), q[0], q[1]);
        each<8>(MOBILELLM_EACH {
            constexpr int n = i / 4;
            constexpr int t = i % 4;
            low[t]          = vdotq_laneq_s32(low[t], w[n].low, vreinterpretq_s8_u8(q[n]), t);
            both[t]         = vdotq_laneq_s32(both[t], w[n].both, vreinterpretq_s8_u8(q[n]), t);
        });
    });
    const float32x4_t low_scale  = scales_at(scales);
    const float32x4_t high_scale = scales_at(scales + 32);
    const float32x4_t d          = vld1q_f32(a.d);
    each<4>(MOBILELLM_EACH {
        low_sum[i]  = vfmaq_f32(low_sum[i], vcvtq_f32_s32(low[i]), vmulq_laneq_f32(low_scale, d, i));
        high_sum[i] = add_high<TYPE>(high_sum[i], low[i], both[i], vmulq_laneq_f32(high_scale, d, i));
    });
}

struct dotprod_isa {
    static constexpr int TILE     = 4;
    static constexpr int ARRANGED = sizeof(four_tokens);

    static void arrange(const uint8_t * q, size_t q_size, int64_t n_blocks, uint8_t * out) {
        for (int64_t b = 0; b < n_blocks; ++b, out += sizeof(four_tokens)) {
            auto & to = *reinterpret_cast<four_tokens *>(out);
            for (int t = 0; t < 4; ++t) {
                const auto & a = reinterpret_cast<const activations *>(q + t * q_size)[b];
                for (int c = 0; c < 8; ++c) {
                    std::memcpy(to.q + 16 * c + 4 * t, a.q + 4 * c, 4);
                }
                to.d[t]         = a.d;
                to.offset[t][0] = a.minus_8_sum;
                to.offset[t][1] = a.minus_sum;
            }
        }
    }

    template <ggml_type TYPE>
    static __attribute__((noinline)) void arranged_rows(const part & p, int r, const four_tokens * a,
                                                        float (*y)[GROUP]) {
        float32x4_t low[4];
        float32x4_t high[4];
        each<4>(MOBILELLM_EACH { low[i] = high[i] = vdupq_n_f32(0.0f); });
        each_pair<TYPE>(p, r == 0 && fetches(p), [&](const uint8_t * pair) __attribute__((always_inline)) {
            const uint8_t * second  = block_of<TYPE>(pair, true);
            const int       quarter = SCALES + quarter_bytes<TYPE>() * r;
            dot_four<TYPE, 0>(pair + 8 * r, pair + quarter, a[0], low, high);
            dot_four<TYPE, 1>(second + 8 * r, second + quarter, a[1], low, high);
            a += 2;
        });
        each<4>(MOBILELLM_EACH {
            vst1q_f32(y[i] + 4 * r, low[i]);
            vst1q_f32(y[i] + 16 + 4 * r, high[i]);
        });
    }

    template <ggml_type TYPE>
    static void arranged_tile(const part & p, const uint8_t * q, float * y, int64_t stride, int64_t rows) {
        float sums[4][GROUP];
        for (int r = 0; r < QUARTERS; ++r) {
            arranged_rows<TYPE>(p, r, reinterpret_cast<const four_tokens *>(q), sums);
        }
        for (int t = 0; t < 4; ++t) {
            store_rows(sums[t], y + t * stride, rows);
        }
    }

    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        dot_tile<TYPE, T>(p, q, q_size, y, stride, rows);
    }
};

}  // namespace

extern const kernels dotprod_kernels;
const kernels        dotprod_kernels = { quantize, matmul<dotprod_isa> };

}  // namespace mobilellm
