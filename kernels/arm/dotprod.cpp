// Processors with dot products, from Cortex-A55 and A76 on (Raspberry Pi 5).

#include "arm/dot_rows.h"
#include "arm/unpacked.h"

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

    static constexpr int SPREAD = 1;

    static MOBILELLM_INLINE void order(int8x16_t (&)[2]) {}

    static MOBILELLM_INLINE void spread(float32x4_t x, float * to) { vst1q_f32(to, x); }

    // Rows of y are `stride` floats apart. LEAST: scales and minima alternate.
    template <bool LEAST>
    static MOBILELLM_INLINE void tile(const void * w, const uint8_t * q, int64_t n_pairs, float * y, int64_t stride) {
        static_assert(sizeof(four_blocks) == 128 + 96 && offsetof(four_blocks, d) == 128 &&
                      offsetof(four_blocks, minus_sum_d) == 128 + 16);
        // clang-format off
#define MOBILELLM_DOT(W, Q)                         \
    "sdot v24.4s, v" W ".16b, v" Q ".4b[0]\n\t"     \
    "sdot v25.4s, v" W ".16b, v" Q ".4b[1]\n\t"     \
    "sdot v26.4s, v" W ".16b, v" Q ".4b[2]\n\t"     \
    "sdot v27.4s, v" W ".16b, v" Q ".4b[3]\n\t"
#define MOBILELLM_ROWS(T0, T1, T2, T3)              \
    MOBILELLM_ZERO("24", "27") MOBILELLM_LOAD("28", "31", "w") MOBILELLM_DOT("28", "16") MOBILELLM_DOT("29", "17") \
    MOBILELLM_DOT("30", "18") MOBILELLM_DOT("31", "19") MOBILELLM_LOAD("28", "31", "w") MOBILELLM_DOT("28", "20")  \
    MOBILELLM_DOT("29", "21")                       \
    "ldr q28, [%[w]], #16\n\t"                      \
    "ldr q29, [%[q]]\n\t"                           \
    MOBILELLM_DOT("30", "22") MOBILELLM_DOT("31", "23") \
    "fmul v30.4s, v28.4s, v29.s[0]\n\t"             \
    "fmul v31.4s, v28.4s, v29.s[1]\n\t"             \
    "scvtf v24.4s, v24.4s\n\t"                      \
    "scvtf v25.4s, v25.4s\n\t"                      \
    "scvtf v26.4s, v26.4s\n\t"                      \
    "scvtf v27.4s, v27.4s\n\t"                      \
    "fmla v" T0 ".4s, v24.4s, v30.4s\n\t"           \
    "fmul v30.4s, v28.4s, v29.s[2]\n\t"             \
    "fmla v" T1 ".4s, v25.4s, v31.4s\n\t"           \
    "fmul v31.4s, v28.4s, v29.s[3]\n\t"             \
    "fmla v" T2 ".4s, v26.4s, v30.4s\n\t"           \
    "fmla v" T3 ".4s, v27.4s, v31.4s\n\t"
#define MOBILELLM_LEAST(T0, T1, T2, T3)             \
    MOBILELLM_ROWS(T0, T1, T2, T3)                  \
    "ldr q28, [%[w]], #16\n\t"                      \
    "ldr q29, [%[q], #16]\n\t"                      \
    "fmls v" T0 ".4s, v28.4s, v29.s[0]\n\t"         \
    "fmls v" T1 ".4s, v28.4s, v29.s[1]\n\t"         \
    "fmls v" T2 ".4s, v28.4s, v29.s[2]\n\t"         \
    "fmls v" T3 ".4s, v28.4s, v29.s[3]\n\t"
#define MOBILELLM_END "add %[q], %[q], #96\n\t"
#define MOBILELLM_STORE                             \
    "st1 {v0.4s-v3.4s}, [%[y]], %[stride]\n\t"      \
    "st1 {v4.4s-v7.4s}, [%[y]], %[stride]\n\t"      \
    "st1 {v8.4s-v11.4s}, [%[y]], %[stride]\n\t"     \
    "st1 {v12.4s-v15.4s}, [%[y]]\n\t"
        // clang-format on
        if constexpr (LEAST) {
            MOBILELLM_TILE(MOBILELLM_LEAST, MOBILELLM_END, MOBILELLM_STORE);
        } else {
            MOBILELLM_TILE(MOBILELLM_ROWS, MOBILELLM_END, MOBILELLM_STORE);
        }
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
    using four = four_tokens;

    static constexpr int TILE     = 4;
    static constexpr int ARRANGED = sizeof(four_blocks);

    static void arrange(const uint8_t * q, size_t q_size, int64_t n_blocks, uint8_t * out) {
        for (int64_t b = 0; b < n_blocks; ++b, out += sizeof(four_blocks)) {
            auto &    to = *reinterpret_cast<four_blocks *>(out);
            int32x4_t x[4];
            each<2>([&](auto part_) __attribute__((always_inline)) {
                constexpr int part = part_;
                load_four<part>(q, q_size, b, x);
                transpose(x);
                each<4>(MOBILELLM_EACH { vst1q_s8(to.q + 64 * part + 16 * i, vreinterpretq_s8_s32(x[i])); });
            });
            load_four<2>(q, q_size, b, x);
            transpose(x);
            const float32x4_t d = vreinterpretq_f32_s32(x[0]);
            vst1q_f32(to.d, d);
            vst1q_f32(to.minus_sum_d, vmulq_f32(vcvtq_f32_s32(x[1]), d));
            vst1q_s32(to.minus_sum[0], x[1]);
            vst1q_s32(to.minus_sum[1], x[3]);
            vst1q_s32(to.minus_sum[2], vsubq_s32(x[1], x[3]));
            vst1q_s32(to.minus_8_sum, x[2]);
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
const kernels        dotprod_kernels = { quantize, matmul_unpacking<dotprod_isa> };

}  // namespace mobilellm
