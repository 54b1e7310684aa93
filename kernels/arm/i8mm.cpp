// Processors that multiply matrices of bytes (Neoverse V1, Apple M2, Cortex-X2 and later): SMMLA takes 2 rows × 8
// columns of weights and 2 tokens at once. Fewer than four tokens are SDOT's.

#include "arm/dot_rows.h"

namespace mobilellm {

namespace {

// A block of two pairs of tokens: 8 columns of both tokens of a pair, first those of pair 0 and 1, then the next 8.
// Numbers of tokens as the sums lie.
struct two_blocks {
    int8_t  q[4][2][16];
    float   d[2][4];
    float   minus_sum_d[2][4];   // -Σ q · d
    int32_t minus_sum[3][2][4];  // of all columns, of the first 16 and of the others
};

// Lane by lane a sum is of a pair's first row by both tokens and of its second by both; sum 2 i + k is that of pair of
// tokens i and pair of rows k.
struct two_pairs {
    static constexpr int  T     = 4;
    static constexpr int  R     = 1;
    static constexpr int  N     = 4;
    static constexpr int  BYTES = sizeof(two_blocks);
    static constexpr bool BOTH  = true;

    MOBILELLM_INLINE two_pairs(const uint8_t * q, size_t) : a(reinterpret_cast<const two_blocks *>(q)) {}

    MOBILELLM_INLINE void advance() { a += 2; }

    // From two registers of 4 rows × 4 columns: 8 columns of rows 2 I and 2 I + 1.
    template <int I, class V>
    static MOBILELLM_INLINE V pair_of_rows(V x, V y) {
        const int32x4_t a = vreinterpretq_s32_u8(uint8x16_t(x));
        const int32x4_t b = vreinterpretq_s32_u8(uint8x16_t(y));
        return V(vreinterpretq_u8_s32(I ? vzip2q_s32(a, b) : vzip1q_s32(a, b)));
    }

    template <ggml_type TYPE, bool SECOND, int K0, int KS>
    MOBILELLM_INLINE void sums(const uint8_t * quarter, int32x4_t (&low_sum)[4], int32x4_t (&high_sum)[4]) const {
        constexpr int part = form_of(TYPE).scaled == BLOCK ? 0 : K0 ? 2 : 1;
        each<4>(MOBILELLM_EACH {
            const int32x4_t minus_sum = vld1q_s32(a[SECOND].minus_sum[part][i / 2]);
            low_sum[i]                = times<low_offset<TYPE>()>(minus_sum);
            high_sum[i]               = times<both_offset<TYPE>()>(minus_sum);
        });
        each<KS>([&](auto step_) __attribute__((always_inline)) {
            constexpr int    k = K0 + step_;
            const raw_chunks x = load<TYPE, SECOND, k, 0>(quarter);
            uint8x16_t       q[2];
            int8x16_t        low[2];
            int8x16_t        both[2];
            load_two<32 * k>(reinterpret_cast<const uint8_t *>(a[SECOND].q), q[0], q[1]);
            if constexpr (shared_bits<TYPE>() > 0) {  // the bytes of both change places at once
                raw_chunks y;
                each<2>(MOBILELLM_EACH {
                    if constexpr (shared_bits<TYPE>() == 4) {
                        y.fours[i] = pair_of_rows<i>(x.fours[0], x.fours[1]);
                    } else {
                        y.twos[i] = pair_of_rows<i>(x.twos[0], x.twos[1]);
                    }
                });
                each<2>(MOBILELLM_EACH {
                    low[i]  = weights_of<TYPE, SECOND, false, i>(y);
                    both[i] = both_of<TYPE, SECOND, i>(y);
                });
            } else {
                int8x16_t l[2];
                int8x16_t h[2];
                each<2>(MOBILELLM_EACH {
                    l[i] = weights_of<TYPE, SECOND, false, 2 * k + i>(x);
                    h[i] = weights_of<TYPE, SECOND, true, 2 * k + i>(x);
                });
                each<2>(MOBILELLM_EACH {
                    low[i]  = pair_of_rows<i>(l[0], l[1]);
                    both[i] = pair_of_rows<i>(h[0], h[1]);
                });
            }
            each<4>(MOBILELLM_EACH {
                low_sum[i]  = vmmlaq_s32(low_sum[i], low[i % 2], vreinterpretq_s8_u8(q[i / 2]));
                high_sum[i] = vmmlaq_s32(high_sum[i], both[i % 2], vreinterpretq_s8_u8(q[i / 2]));
            });
        });
    }

    template <int BY>
    static MOBILELLM_INLINE int32x4_t times(int32x4_t x) {
        return BY == 0 ? vdupq_n_s32(0) : vmulq_n_s32(x, BY);
    }

    template <int I>
    static MOBILELLM_INLINE float32x4_t rows(const float32x4_t (&x)[1]) {
        return I % 2 ? vzip2q_f32(x[0], x[0]) : vzip1q_f32(x[0], x[0]);
    }

    template <int I>
    static MOBILELLM_INLINE int32x4_t rows(const int32x4_t (&x)[1]) {
        return I % 2 ? vzip2q_s32(x[0], x[0]) : vzip1q_s32(x[0], x[0]);
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t by_scale(const float32x4_t (&x)[1]) const {
        return vmulq_f32(rows<I>(x), vld1q_f32(a[SECOND].d[I / 2]));
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t add_scaled(float32x4_t to, float32x4_t x) const {
        return vfmaq_f32(to, x, vld1q_f32(a[SECOND].d[I / 2]));
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t add_sum(float32x4_t to, const float32x4_t (&x)[1]) const {
        return vfmaq_f32(to, rows<I>(x), vld1q_f32(a[SECOND].minus_sum_d[I / 2]));
    }

    template <int I, bool SECOND>
    MOBILELLM_INLINE float32x4_t take_sum(float32x4_t to, const float32x4_t (&x)[1]) const {
        return vfmsq_f32(to, rows<I>(x), vld1q_f32(a[SECOND].minus_sum_d[I / 2]));
    }

    static MOBILELLM_INLINE void store(const float32x4_t (&sums)[4], float * y, int64_t stride) {
        each<2>(MOBILELLM_EACH {
            vst1q_f32(y + 2 * i * stride, vuzp1q_f32(sums[2 * i], sums[2 * i + 1]));
            vst1q_f32(y + (2 * i + 1) * stride, vuzp2q_f32(sums[2 * i], sums[2 * i + 1]));
        });
    }

    const two_blocks * a;
};

struct i8mm_isa {
    static constexpr int TILE     = 4;
    static constexpr int ARRANGED = sizeof(two_blocks);

    static void arrange(const uint8_t * q, size_t q_size, int64_t n_blocks, uint8_t * out) {
        for (int64_t b = 0; b < n_blocks; ++b, out += sizeof(two_blocks)) {
            auto & to = *reinterpret_cast<two_blocks *>(out);
            for (int t = 0; t < 4; ++t) {
                const auto & a = reinterpret_cast<const activations *>(q + t * q_size)[b];
                for (int k = 0; k < 4; ++k) {
                    std::memcpy(to.q[k][t / 2] + 8 * (t % 2), a.q + 8 * k, 8);
                }
                for (const int lane : { t % 2, 2 + t % 2 }) {
                    to.d[t / 2][lane]            = a.d;
                    to.minus_sum_d[t / 2][lane]  = float(a.minus_sum) * a.d;
                    to.minus_sum[0][t / 2][lane] = a.minus_sum;
                    to.minus_sum[1][t / 2][lane] = a.minus_first_sum;
                    to.minus_sum[2][t / 2][lane] = a.minus_sum - a.minus_first_sum;
                }
            }
        }
    }

    template <ggml_type TYPE>
    static void arranged_tile(const part & p, const uint8_t * q, float * y, int64_t stride, int64_t rows) {
        mobilellm::tile<TYPE, two_pairs>(p, q, 0, y, stride, rows);
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
