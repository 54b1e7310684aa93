// AVX-512 with VNNI: a register is 16 rows × 4 columns, so one vpdpbusd multiplies a chunk with 4 activations that
// are broadcast from memory, once for both halves of a group. Quants are used unsigned; what makes weights of them is
// taken off the sums, and where two rows share bytes the high one's is what the difference makes, see kernels.h.

#include "tiles.h"

#include <immintrin.h>

namespace mobilellm {

namespace {

struct avx512vnni_isa {
    static constexpr int TILE     = 6;
    static constexpr int ARRANGED = 0;

    // x · 2^by, whose bits that come from neighbouring bytes are to be masked.
    static MOBILELLM_INLINE __m512i shifted(__m512i x, int by) {
        return by > 0 ? _mm512_slli_epi16(x, by) : by < 0 ? _mm512_srli_epi16(x, -by) : x;
    }

    // a | (x & mask)
    static MOBILELLM_INLINE __m512i with_bits(__m512i a, __m512i x, int mask) {
        return _mm512_ternarylogic_epi64(a, x, _mm512_set1_epi8(char(mask)), 0xF8);
    }

    // Columns 4i to 4i + 3 of the low and the high rows, without sign; where two rows share bytes, of both in `high`.
    template <ggml_type TYPE>
    static MOBILELLM_INLINE void quants(const square<TYPE> & w, int i, __m512i & low, __m512i & high) {
        constexpr form F = form_of(TYPE);

        const __m512i four = _mm512_set1_epi8(15);
        const __m512i two  = _mm512_set1_epi8(3);
        if constexpr (has_rest(F)) {
            constexpr int rest = rest_bits(F);
            const __m512i both = _mm512_load_si512(w.bytes(i));
            const __m512i own  = shifted(_mm512_load_si512(w.rests(i)), -(i * rest % 8));
            low                = _mm512_and_si512(both, _mm512_set1_epi8((1 << F.bits) - 1));
            high               = _mm512_and_si512(own, _mm512_set1_epi8((1 << rest) - 1));
            high               = with_bits(high, shifted(both, F.bits - 8), (1 << F.bits) - (1 << rest));
        }
        if constexpr (F.bits == 8) {
            const __m512i sign = _mm512_set1_epi8(-128);
            low                = _mm512_xor_si512(_mm512_load_si512(w.chunk(8, 2 * i)), sign);
            high               = _mm512_xor_si512(_mm512_load_si512(w.chunk(8, 2 * i + 1)), sign);
        }
        if constexpr (has_plane(F, 4)) {
            high = _mm512_load_si512(w.chunk(4, i));
            low  = _mm512_and_si512(high, four);
            if constexpr (!shared<TYPE>()) {
                high = _mm512_and_si512(_mm512_srli_epi16(high, 4), four);
            }
        }
        if constexpr (has_plane(F, 2)) {
            const __m512i x  = _mm512_load_si512(w.chunk(2, i));
            const int     at = w.in_second ? 4 : 0;
            high             = _mm512_and_si512(shifted(x, -at), shared<TYPE>() ? four : two);
            low              = shared<TYPE>() ? _mm512_and_si512(high, two) : _mm512_and_si512(shifted(x, -at), two);
            high             = shared<TYPE>() ? high : _mm512_and_si512(shifted(x, -at - 2), two);
        }
        if constexpr (has_plane(F, 1)) {
            constexpr int to = plane_bit(F, 1);
            low              = with_bits(low, shifted(_mm512_load_si512(w.chunk(1, 0)), to - i), 1 << to);
            high             = with_bits(high, shifted(_mm512_load_si512(w.chunk(1, 1)), to - i), 1 << to);
        }
        if constexpr (F.table) {
            const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(TABLE)));
            low                 = _mm512_shuffle_epi8(table, low);
            high                = _mm512_shuffle_epi8(table, high);
        }
    }

    template <ggml_type TYPE>
    static constexpr bool shared() {
        return !form_of(TYPE).table && (form_of(TYPE).bits == 4 || form_of(TYPE).bits == 2);
    }

    // Of 16 rows, the low or the high ones: the scales of column c, or the minima.
    template <ggml_type TYPE>
    static MOBILELLM_INLINE __m512 scales(const square<TYPE> & w, int c, bool least, bool high) {
        const uint8_t * halves = w.halves + 64 * least + 32 * high;
        const __m512    scale  = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i *>(halves)));
        if constexpr (form_of(TYPE).subs == 0) {
            return scale;
        }
        const auto * smaller = reinterpret_cast<const __m128i *>(w.smaller_of(c, least) + 16 * high);
        return _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(smaller))));
    }

    // sum += a square times T tokens.
    template <ggml_type TYPE, int T>
    static MOBILELLM_INLINE void multiply(const square<TYPE> & w, const activations * q, size_t q_size,
                                          __m512 * low_sum, __m512 * high_sum) {
        constexpr form F = form_of(TYPE);

        const auto token = [&](int t) {
            return reinterpret_cast<const activations *>(reinterpret_cast<const uint8_t *>(q) + t * q_size);
        };
        // -Σ q of the columns from c on that share a scale
        const auto minus_sum = [&](int t, int c) {
            if constexpr (F.scaled == BLOCK) {
                return _mm512_set1_epi32(token(t)->minus_sum);
            }
            const int32_t first = token(t)->minus_first_sum;
            return _mm512_set1_epi32(c == 0 ? first : token(t)->minus_sum - first);
        };
        const auto offset = [&](int t, int c) {
            return F.offset == 8 ? _mm512_set1_epi32(token(t)->minus_8_sum)
                                 : _mm512_slli_epi32(minus_sum(t, c), __builtin_ctz(F.offset));
        };
#pragma GCC unroll 2
        for (int c = 0; c < BLOCK; c += F.scaled) {
            // Σ quants q of the low rows; that of the high ones, or where they share bytes of both
            __m512i low[T];
            __m512i high[T];
            for (int t = 0; t < T; ++t) {
                low[t] = high[t] = F.offset && !shared<TYPE>() ? offset(t, c) : _mm512_setzero_si512();
            }
#pragma GCC unroll 8
            for (int i = 0; i < F.scaled / 4; ++i) {
                __m512i l;
                __m512i h;
                quants<TYPE>(w, c / 4 + i, l, h);
                for (int t = 0; t < T; ++t) {
                    const __m512i four = _mm512_set1_epi32(reinterpret_cast<const int32_t *>(token(t)->q)[c / 4 + i]);
                    low[t]             = _mm512_dpbusd_epi32(low[t], l, four);
                    high[t]            = _mm512_dpbusd_epi32(high[t], h, four);
                }
            }
            const __m512 low_scale  = scales<TYPE>(w, c, false, false);
            const __m512 high_scale = scales<TYPE>(w, c, false, true);
            for (int t = 0; t < T; ++t) {
                if constexpr (shared<TYPE>()) {
                    high[t] = _mm512_srai_epi32(_mm512_sub_epi32(high[t], low[t]), F.bits);
                    if constexpr (F.offset > 0) {
                        high[t] = _mm512_add_epi32(high[t], offset(t, c));
                        low[t]  = _mm512_add_epi32(low[t], offset(t, c));
                    }
                }
                const __m512 d = _mm512_set1_ps(token(t)->d);
                low_sum[t]     = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(low[t]), d), low_scale, low_sum[t]);
                high_sum[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(high[t]), d), high_scale, high_sum[t]);
            }
            if constexpr (F.halves == 2) {
                const __m512 low_least  = scales<TYPE>(w, c, true, false);
                const __m512 high_least = scales<TYPE>(w, c, true, true);
                for (int t = 0; t < T; ++t) {
                    const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(minus_sum(t, c)), _mm512_set1_ps(token(t)->d));
                    if constexpr (F.subs > 0) {  // the minimum is taken off
                        low_sum[t]  = _mm512_fmadd_ps(sum, low_least, low_sum[t]);
                        high_sum[t] = _mm512_fmadd_ps(sum, high_least, high_sum[t]);
                    } else {
                        low_sum[t]  = _mm512_fnmadd_ps(sum, low_least, low_sum[t]);
                        high_sum[t] = _mm512_fnmadd_ps(sum, high_least, high_sum[t]);
                    }
                }
            }
        }
    }

    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        __m512 low[T];
        __m512 high[T];
        for (int t = 0; t < T; ++t) {
            low[t] = high[t] = _mm512_setzero_ps();
        }
        each_square<TYPE, true>(p, q, [&](const square<TYPE> & w, const activations * a) MOBILELLM_ALWAYS {
            multiply<TYPE, T>(w, a, q_size, low, high);
        });
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
