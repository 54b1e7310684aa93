// AVX-512 with VNNI: a register is 16 rows × 4 columns, so one vpdpbusd multiplies a chunk with 4 activations that
// are broadcast from memory, once for both halves of a group. Weights are used unsigned, w + offset; the sums start at
// -offset · Σ q, and where two rows share bytes the high one's is what the difference makes, see kernels.h.

#include "tiles.h"

#include <immintrin.h>

namespace mobilellm {

namespace {

struct avx512vnni_isa {
    static constexpr int TILE = 6;

    static MOBILELLM_INLINE __m512 scales_at(const uint8_t * scales) {
        return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i *>(scales)));
    }

    // sum += a block of 32 rows × 32 columns times T tokens; `second`: which block of a pair.
    template <ggml_type TYPE, int T>
    static MOBILELLM_INLINE void block(const uint8_t * both, bool second, const activations * q, size_t q_size,
                                       __m512 * low_sum, __m512 * high_sum) {
        const uint8_t * scales = block_of<TYPE>(both, second);
        const uint8_t * quants = scales + SCALES;
        constexpr int   shift  = TYPE == GGML_TYPE_Q4_0 ? 4 : TYPE == GGML_TYPE_Q2_0 ? 2 : 0;

        const auto token = [&](int t) {
            return reinterpret_cast<const activations *>(reinterpret_cast<const uint8_t *>(q) + t * q_size);
        };
        const __m512i sign   = _mm512_set1_epi8(-128);
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i pair   = _mm512_set1_epi8(3);

        // Σ w q of the low rows; that of the high ones, or where they share bytes of both: low + 2^shift high
        __m512i low[T];
        __m512i high[T];
        for (int t = 0; t < T; ++t) {
            const __m512i minus_sum = _mm512_set1_epi32(token(t)->minus_sum);
            low[t] = high[t] = TYPE == GGML_TYPE_Q8_0 ? _mm512_slli_epi32(minus_sum, 7) : _mm512_setzero_si512();
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            __m512i l;
            __m512i h;
            if constexpr (TYPE == GGML_TYPE_Q8_0) {
                l = _mm512_xor_si512(_mm512_load_si512(quants + 128 * i), sign);
                h = _mm512_xor_si512(_mm512_load_si512(quants + 128 * i + 64), sign);
            } else if constexpr (TYPE == GGML_TYPE_Q4_0) {
                h = _mm512_load_si512(quants + 64 * i);
                l = _mm512_and_si512(h, nibble);
            } else {
                const __m512i x = _mm512_load_si512(quants + 64 * i);
                h               = _mm512_and_si512(second ? _mm512_srli_epi16(x, 4) : x, nibble);
                l               = _mm512_and_si512(h, pair);
            }
            for (int t = 0; t < T; ++t) {
                const __m512i four = _mm512_set1_epi32(reinterpret_cast<const int32_t *>(token(t)->q)[i]);
                low[t]             = _mm512_dpbusd_epi32(low[t], l, four);
                high[t]            = _mm512_dpbusd_epi32(high[t], h, four);
            }
        }
        const __m512 low_scale  = scales_at(scales);
        const __m512 high_scale = scales_at(scales + 32);
        for (int t = 0; t < T; ++t) {
            if constexpr (shift > 0) {
                const bool    q4     = TYPE == GGML_TYPE_Q4_0;
                const __m512i offset = _mm512_set1_epi32(q4 ? token(t)->minus_8_sum : token(t)->minus_sum);
                high[t] = _mm512_add_epi32(_mm512_srai_epi32(_mm512_sub_epi32(high[t], low[t]), shift), offset);
                low[t]  = _mm512_add_epi32(low[t], offset);
            }
            const __m512 d = _mm512_set1_ps(token(t)->d);
            low_sum[t]     = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(low[t]), d), low_scale, low_sum[t]);
            high_sum[t]    = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(high[t]), d), high_scale, high_sum[t]);
        }
    }

    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        __m512 low[T];
        __m512 high[T];
        for (int t = 0; t < T; ++t) {
            low[t] = high[t] = _mm512_setzero_ps();
        }
        const uint8_t * pair = p.data;
        const auto *    a    = reinterpret_cast<const activations *>(q);
        for (int64_t i = 0; i < p.n_pairs; ++i) {
            prefetch<TYPE>(p, i);
            block<TYPE, T>(pair, false, a, q_size, low, high);
            block<TYPE, T>(pair, true, a + 1, q_size, low, high);
            pair += pair_bytes<TYPE>();
            a += 2;
        }
        const auto      first     = [](int64_t n) { return n >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << n) - 1); };
        const __mmask16 low_rows  = first(rows);
        const __mmask16 high_rows = first(rows > 16 ? rows - 16 : 0);
        for (int t = 0; t < T; ++t) {
            _mm512_mask_storeu_ps(y + t * stride, low_rows, low[t]);
            _mm512_mask_storeu_ps(y + t * stride + 16, high_rows, high[t]);
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
const kernels        avx512vnni_kernels = { quantize, matmul<avx512vnni_isa> };

}  // namespace mobilellm
