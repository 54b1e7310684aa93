// Processors with dot products, from Cortex-A55 and A76 on (Raspberry Pi 5).

#include "arm/dot_rows.h"

namespace mobilellm {

namespace {

// A block of four tokens: the columns of chunk c, token by token, at 16 c.
struct four_blocks {
    int8_t  q[8 * 16];
    float   d[4];
    float   minus_sum_d[4];   // -Σ q · d
    int32_t minus_sum[3][4];  // of all columns, of the first 16 and of the others
    int32_t minus_8_sum[4];
};

struct four_tokens {
    static constexpr int  T     = 4;
    static constexpr int  R     = 1;
    static constexpr int  N     = 4;
    static constexpr int  BYTES = sizeof(four_blocks);
    static constexpr bool BOTH  = true;

    MOBILELLM_INLINE four_tokens(const uint8_t * q, size_t) : a(reinterpret_cast<const four_blocks *>(q)) {}

    MOBILELLM_INLINE void advance() { a += 2; }

    template <ggml_type TYPE, bool SECOND, int K0, int KS>
    MOBILELLM_INLINE void sums(const uint8_t * quarter, int32x4_t (&low_sum)[4], int32x4_t (&high_sum)[4]) const {
        each<4>(MOBILELLM_EACH {
            low_sum[i]  = start<TYPE, low_offset<TYPE>(), SECOND, K0, i>();
            high_sum[i] = start<TYPE, both_offset<TYPE>(), SECOND, K0, i>();
        });
        each<KS>([&](auto step_) __attribute__((always_inline)) {
            constexpr int    k = K0 + step_;
            const raw_chunks x = load<TYPE, SECOND, k, 0>(quarter);
            uint8x16_t       q[2];
            load_two<32 * k>(reinterpret_cast<const uint8_t *>(a[SECOND].q), q[0], q[1]);
            each<2>([&](auto n_) __attribute__((always_inline)) {
                constexpr int   n    = n_;
                const int8x16_t low  = weights_of<TYPE, SECOND, false, 2 * k + n>(x);
                const int8x16_t both = both_of<TYPE, SECOND, 2 * k + n>(x);
                const int8x16_t four = vreinterpretq_s8_u8(q[n]);
                each<4>(MOBILELLM_EACH {
                    low_sum[i]  = vdotq_laneq_s32(low_sum[i], low, four, i);
                    high_sum[i] = vdotq_laneq_s32(high_sum[i], both, four, i);
                });
            });
        });
    }

    // OFFSET · -Σ q of token I.
    template <ggml_type TYPE, int OFFSET, bool SECOND, int K0, int I>
    MOBILELLM_INLINE int32x4_t start() const {
        constexpr int part = form_of(TYPE).scaled == BLOCK ? 0 : K0 ? 2 : 1;
        if constexpr (OFFSET == 0) {
            return vdupq_n_s32(0);
        } else if constexpr (OFFSET == 8 && part == 0) {
            return vld1q_dup_s32(a[SECOND].minus_8_sum + I);
        } else {
            return vmulq_n_s32(vld1q_dup_s32(a[SECOND].minus_sum[part] + I), OFFSET);
        }
    }

    template <int I, class V>
    static MOBILELLM_INLINE V rows(const V (&x)[1]) {
        return x[0];
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t by_scale(const float32x4_t (&x)[1]) const {
        return vmulq_laneq_f32(x[0], vld1q_f32(a[SECOND].d), I);
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t add_scaled(float32x4_t to, float32x4_t x) const {
        return vfmaq_laneq_f32(to, x, vld1q_f32(a[SECOND].d), I);
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t add_sum(float32x4_t to, const float32x4_t (&x)[1]) const {
        return vfmaq_laneq_f32(to, x[0], vld1q_f32(a[SECOND].minus_sum_d), I);
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t take_sum(float32x4_t to, const float32x4_t (&x)[1]) const {
        return vfmsq_laneq_f32(to, x[0], vld1q_f32(a[SECOND].minus_sum_d), I);
    }

    static MOBILELLM_INLINE void store(const float32x4_t (&sums)[4], float * y, int64_t stride) {
        each<4>(MOBILELLM_EACH { vst1q_f32(y + i * stride, sums[i]); });
    }

    const four_blocks * a;
};

struct dotprod_isa {
    static constexpr int TILE     = 4;
    static constexpr int ARRANGED = sizeof(four_blocks);

    static void arrange(const uint8_t * q, size_t q_size, int64_t n_blocks, uint8_t * out) {
        for (int64_t b = 0; b < n_blocks; ++b, out += sizeof(four_blocks)) {
            auto & to = *reinterpret_cast<four_blocks *>(out);
            for (int t = 0; t < 4; ++t) {
                const auto & a = reinterpret_cast<const activations *>(q + t * q_size)[b];
                for (int c = 0; c < 8; ++c) {
                    std::memcpy(to.q + 16 * c + 4 * t, a.q + 4 * c, 4);
                }
                to.d[t]            = a.d;
                to.minus_sum_d[t]  = float(a.minus_sum) * a.d;
                to.minus_sum[0][t] = a.minus_sum;
                to.minus_sum[1][t] = a.minus_first_sum;
                to.minus_sum[2][t] = a.minus_sum - a.minus_first_sum;
                to.minus_8_sum[t]  = a.minus_8_sum;
            }
        }
    }

    template <ggml_type TYPE>
    static void arranged_tile(const part & p, const uint8_t * q, float * y, int64_t stride, int64_t rows) {
        mobilellm::tile<TYPE, four_tokens>(p, q, 0, y, stride, rows);
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
