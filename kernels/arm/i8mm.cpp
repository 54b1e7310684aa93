// Processors that multiply matrices of bytes (Neoverse V1, Apple M2, Cortex-X2 and later): SMMLA takes 2 rows × 8
// columns of weights and 2 tokens at once. Fewer than four tokens are SDOT's.

#include "arm/dot_rows.h"
#include "arm/unpacked.h"

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

    static MOBILELLM_INLINE void order(int8x16_t (&w)[2]) {
        const int8x16_t first = pair_of_rows<0>(w[0], w[1]);
        w[1]                  = pair_of_rows<1>(w[0], w[1]);
        w[0]                  = first;
    }

    static constexpr int SPREAD = 2;

    static MOBILELLM_INLINE void spread(float32x4_t x, float * to) {
        vst1q_f32(to, vzip1q_f32(x, x));
        vst1q_f32(to + 4, vzip2q_f32(x, x));
    }

    // Rows of y are `stride` floats apart. LEAST: scales and minima alternate.
    template <bool LEAST>
    static MOBILELLM_INLINE void tile(const void * w, const uint8_t * q, int64_t n_pairs, float * y, int64_t stride) {
        static_assert(sizeof(two_blocks) == 128 + 160 && offsetof(two_blocks, d) == 128 &&
                      offsetof(two_blocks, minus_sum_d) == 128 + 32);
        // clang-format off
#define MOBILELLM_MULTIPLY(W0, W1, Q0, Q1)          \
    "smmla v24.4s, v" W0 ".16b, v" Q0 ".16b\n\t"    \
    "smmla v25.4s, v" W1 ".16b, v" Q0 ".16b\n\t"    \
    "smmla v26.4s, v" W0 ".16b, v" Q1 ".16b\n\t"    \
    "smmla v27.4s, v" W1 ".16b, v" Q1 ".16b\n\t"
#define MOBILELLM_SCALED(I, J, T, U)                \
    "ldr q28, [%[w]], #16\n\t"                      \
    "fmul v29.4s, v28.4s, v30.4s\n\t"               \
    "fmul v28.4s, v28.4s, v31.4s\n\t"               \
    "fmla v" T ".4s, v" I ".4s, v29.4s\n\t"         \
    "fmla v" U ".4s, v" J ".4s, v28.4s\n\t"
#define MOBILELLM_ROWS(T0, T1, T2, T3)              \
    MOBILELLM_ZERO("24", "27") MOBILELLM_LOAD("28", "31", "w") MOBILELLM_MULTIPLY("28", "29", "16", "17") \
    MOBILELLM_MULTIPLY("30", "31", "18", "19") MOBILELLM_LOAD("28", "31", "w")                            \
    MOBILELLM_MULTIPLY("28", "29", "20", "21") MOBILELLM_MULTIPLY("30", "31", "22", "23")                 \
    "ldp q30, q31, [%[q]]\n\t"                      \
    "scvtf v24.4s, v24.4s\n\t"                      \
    "scvtf v26.4s, v26.4s\n\t"                      \
    "scvtf v25.4s, v25.4s\n\t"                      \
    "scvtf v27.4s, v27.4s\n\t"                      \
    MOBILELLM_SCALED("24", "26", T0, T2) MOBILELLM_SCALED("25", "27", T1, T3)
#define MOBILELLM_LESS(T, U)                        \
    "ldr q28, [%[w]], #16\n\t"                      \
    "fmls v" T ".4s, v28.4s, v30.4s\n\t"            \
    "fmls v" U ".4s, v28.4s, v31.4s\n\t"
#define MOBILELLM_LEAST(T0, T1, T2, T3)             \
    MOBILELLM_ROWS(T0, T1, T2, T3)                  \
    "ldp q30, q31, [%[q], #32]\n\t"                 \
    MOBILELLM_LESS(T0, T2) MOBILELLM_LESS(T1, T3)
#define MOBILELLM_END "add %[q], %[q], #160\n\t"
#define MOBILELLM_TOKEN(UZP, A, B, C, D, E, F, G, H) \
    UZP " v16.4s, v" A ".4s, v" B ".4s\n\t"         \
    UZP " v17.4s, v" C ".4s, v" D ".4s\n\t"         \
    UZP " v18.4s, v" E ".4s, v" F ".4s\n\t"         \
    UZP " v19.4s, v" G ".4s, v" H ".4s\n\t"         \
    "st1 {v16.4s-v19.4s}, [%[y]], %[stride]\n\t"
#define MOBILELLM_STORE                             \
    MOBILELLM_TOKEN("uzp1", "0", "4", "1", "5", "2", "6", "3", "7")       \
    MOBILELLM_TOKEN("uzp2", "0", "4", "1", "5", "2", "6", "3", "7")       \
    MOBILELLM_TOKEN("uzp1", "8", "12", "9", "13", "10", "14", "11", "15") \
    MOBILELLM_TOKEN("uzp2", "8", "12", "9", "13", "10", "14", "11", "15")
        // clang-format on
        if constexpr (LEAST) {
            MOBILELLM_TILE(MOBILELLM_LEAST, MOBILELLM_END, MOBILELLM_STORE);
        } else {
            MOBILELLM_TILE(MOBILELLM_ROWS, MOBILELLM_END, MOBILELLM_STORE);
        }
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
    using four = two_pairs;

    static constexpr int TILE     = 4;
    static constexpr int ARRANGED = sizeof(two_blocks);

    static void arrange(const uint8_t * q, size_t q_size, int64_t n_blocks, uint8_t * out) {
        for (int64_t b = 0; b < n_blocks; ++b, out += sizeof(two_blocks)) {
            auto &    to = *reinterpret_cast<two_blocks *>(out);
            int32x4_t x[4];
            each<2>([&](auto part_) __attribute__((always_inline)) {
                constexpr int part = part_;
                load_four<part>(q, q_size, b, x);
                each<2>(MOBILELLM_EACH {
                    const int64x2_t even = vreinterpretq_s64_s32(x[2 * i]);
                    const int64x2_t odd  = vreinterpretq_s64_s32(x[2 * i + 1]);
                    vst1q_s8(to.q[2 * part][i], vreinterpretq_s8_s64(vzip1q_s64(even, odd)));
                    vst1q_s8(to.q[2 * part + 1][i], vreinterpretq_s8_s64(vzip2q_s64(even, odd)));
                });
            });
            load_four<2>(q, q_size, b, x);
            transpose(x);
            const int32x4_t d = vreinterpretq_s32_f32(vmulq_f32(vcvtq_f32_s32(x[1]), vreinterpretq_f32_s32(x[0])));
            twice(x[0], reinterpret_cast<int32_t (&)[2][4]>(to.d));
            twice(d, reinterpret_cast<int32_t (&)[2][4]>(to.minus_sum_d));
            twice(x[1], to.minus_sum[0]);
            twice(x[3], to.minus_sum[1]);
            twice(vsubq_s32(x[1], x[3]), to.minus_sum[2]);
        }
    }

    // Of four tokens, as the sums of a pair lie.
    static MOBILELLM_INLINE void twice(int32x4_t x, int32_t (&to)[2][4]) {
        vst1q_s32(to[0], vcombine_s32(vget_low_s32(x), vget_low_s32(x)));
        vst1q_s32(to[1], vcombine_s32(vget_high_s32(x), vget_high_s32(x)));
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
const kernels        i8mm_kernels = { quantize, matmul_unpacking<i8mm_isa> };

}  // namespace mobilellm
