// AVX-512 with VNNI: a register is 16 rows × 4 columns, so one vpdpbusd multiplies a chunk with 4 activations that
// are broadcast from memory. Weights are used unsigned, w + offset; the sum starts at -offset · Σ q.

#include "tiles.h"

namespace mobilellm {

namespace {

struct avx512vnni_isa {
    static constexpr int TILE = 12;

    // The 8 chunks of 4 columns of a block, unsigned. `second`: which block of a pair.
    template <ggml_type TYPE>
    static MOBILELLM_INLINE void load(const uint8_t * quants, bool second, __m512i * w) {
        if constexpr (TYPE == GGML_TYPE_Q8_0) {
            const __m512i sign = _mm512_set1_epi8(-128);
            for (int i = 0; i < 8; ++i) {
                w[i] = _mm512_xor_si512(_mm512_load_si512(quants + 512 * second + 64 * i), sign);
            }
        } else if constexpr (TYPE == GGML_TYPE_Q4_0) {
            const __m512i mask = _mm512_set1_epi8(15);
            for (int i = 0; i < 4; ++i) {
                const __m512i x = _mm512_load_si512(quants + 256 * second + 64 * i);
                w[i]            = _mm512_and_si512(x, mask);
                w[4 + i]        = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
            }
        } else {
            const __m512i mask = _mm512_set1_epi8(3);
            for (int i = 0; i < 4; ++i) {
                const __m512i x = _mm512_load_si512(quants + 64 * i);
                w[i]            = _mm512_and_si512(second ? _mm512_srli_epi16(x, 4) : x, mask);
                w[4 + i]        = _mm512_and_si512(_mm512_srli_epi16(x, second ? 6 : 2), mask);
            }
        }
    }

    template <ggml_type TYPE, int T>
    static MOBILELLM_INLINE void block(const uint8_t * quants, bool second, __m512 scale, const activations * q,
                                       size_t q_size, __m512 * sum) {
        __m512i w[8];
        load<TYPE>(quants, second, w);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            const auto * a = reinterpret_cast<const activations *>(reinterpret_cast<const uint8_t *>(q) + t * q_size);
            const auto * four = reinterpret_cast<const int32_t *>(a->q);
            __m512i      dot  = _mm512_set1_epi32(TYPE == GGML_TYPE_Q8_0   ? a->minus_128_sum
                                                  : TYPE == GGML_TYPE_Q4_0 ? a->minus_8_sum
                                                                           : a->minus_sum);
            for (int i = 0; i < 8; ++i) {
                dot = _mm512_dpbusd_epi32(dot, w[i], _mm512_set1_epi32(four[i]));
            }
            sum[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(a->d)), scale, sum[t]);
        }
    }

    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        __m512 sum[T];
        for (int t = 0; t < T; ++t) {
            sum[t] = _mm512_setzero_ps();
        }
        const uint8_t * scales = p.scales;
        const uint8_t * quants = p.quants;
        const auto *    a      = reinterpret_cast<const activations *>(q);
        for (int64_t i = 0; i < p.n_pairs; ++i) {
            prefetch<TYPE>(p, i);
            const __m512 first = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i *>(scales)));
            const __m512 second =
                TYPE == GGML_TYPE_Q2_0
                    ? first
                    : _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i *>(scales + 32)));
            block<TYPE, T>(quants, false, first, a, q_size, sum);
            block<TYPE, T>(quants, true, second, a + 1, q_size, sum);
            scales += scale_bytes<TYPE>();
            quants += pair_bytes<TYPE>();
            a += 2;
        }
        const __mmask16 mask = __mmask16((1u << rows) - 1);
        for (int t = 0; t < T; ++t) {
            _mm512_mask_storeu_ps(y + t * stride, mask, sum[t]);
        }
    }
};

void quantize(const float * x, int64_t n_cols, activations * out) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    for (int64_t b = 0; b < n_cols / BLOCK; ++b, x += BLOCK, ++out) {
        const __m512  low  = _mm512_loadu_ps(x);
        const __m512  high = _mm512_loadu_ps(x + 16);
        // magnitudes compare as integers, infinities and NaNs above all others
        const int32_t bits =
            _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                                     _mm512_and_si512(_mm512_castps_si512(high), magnitude)));
        const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
        const bool  finite  = bits < 0x7F800000;

        __m512i first  = _mm512_setzero_si512();
        __m512i second = _mm512_setzero_si512();
        out->d         = finite ? 0.0f : __builtin_nanf("");
        if (finite && largest >= 1e-30f) {
            const __m512 factor = _mm512_set1_ps(127.0f / largest);
            first               = _mm512_cvtps_epi32(_mm512_mul_ps(low, factor));
            second              = _mm512_cvtps_epi32(_mm512_mul_ps(high, factor));
            out->d              = largest / 127.0f;
        }
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out->q), _mm512_cvtepi32_epi8(first));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out->q + 16), _mm512_cvtepi32_epi8(second));
        set_sum(*out, _mm512_reduce_add_epi32(_mm512_add_epi32(first, second)));
    }
}

}  // namespace

extern const kernels avx512vnni_kernels;
const kernels        avx512vnni_kernels = { "avx512vnni", quantize, matmul<avx512vnni_isa> };

}  // namespace mobilellm
