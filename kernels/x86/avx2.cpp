// AVX2: a register is 8 rows × 4 columns, half a chunk; an octet is 8 rows of a group. Nibbles and bit pairs are used
// unsigned and summed in 16 bits, which a block of 32 fits (16 · 15 · 127 a lane); one conversion to 32 bits a block
// takes the offset back. Bytes are multiplied as |w| · sign(a, w), which does not saturate even at w = -128, and summed
// in 32 bits.

#include "tiles.h"

#include <immintrin.h>

namespace mobilellm {

namespace {

struct avx2_isa {
    static constexpr int TILE   = 4;
    static constexpr int OCTETS = GROUP / 8;

    // the half of chunk i where an octet's rows lie
    static MOBILELLM_INLINE __m256i half_chunk(const uint8_t * quants, int i, int octet) {
        return _mm256_load_si256(reinterpret_cast<const __m256i *>(quants + 64 * i + 32 * (octet % 2)));
    }

    // GCC would sum all products of a block at its end and run out of registers.
    static MOBILELLM_INLINE void in_register(__m256i & sum) { __asm__("" : "+x"(sum)); }

    // dot[h][t] of H octets of a group from octet FIRST on; `second`: which block of a pair.
    template <ggml_type TYPE, int T, int FIRST, int H>
    static MOBILELLM_INLINE void block(const uint8_t * quants, bool second, const activations * q, size_t q_size,
                                       __m256i dot[H][T]) {
        const auto token = [&](int t) {
            return reinterpret_cast<const activations *>(reinterpret_cast<const uint8_t *>(q) + t * q_size);
        };
        const auto four = [&](int t, int i) {
            return _mm256_set1_epi32(reinterpret_cast<const int32_t *>(token(t)->q)[i]);
        };
        const __m256i ones = _mm256_set1_epi16(1);
        for (int h = 0; h < H; ++h) {
            for (int t = 0; t < T; ++t) {
                dot[h][t] = _mm256_setzero_si256();
            }
        }
        if constexpr (TYPE == GGML_TYPE_Q8_0) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                for (int h = 0; h < H; ++h) {
                    const __m256i w    = half_chunk(quants, 2 * i + (FIRST + h) / 2, FIRST + h);
                    const __m256i size = _mm256_abs_epi8(w);
                    for (int t = 0; t < T; ++t) {
                        const __m256i product = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(t, i), w));
                        dot[h][t]             = _mm256_add_epi32(dot[h][t], _mm256_madd_epi16(product, ones));
                        in_register(dot[h][t]);
                    }
                }
            }
        } else {
            constexpr int bits = TYPE == GGML_TYPE_Q4_0 ? 4 : 2;
            const __m256i mask = _mm256_set1_epi8((1 << bits) - 1);
            const int     from = TYPE == GGML_TYPE_Q2_0 ? 4 * second : 0;  // bit
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                for (int h = 0; h < H; ++h) {
                    const __m256i x = half_chunk(quants, i, FIRST + h);
                    const __m256i w = _mm256_and_si256(_mm256_srli_epi16(x, from + (FIRST + h < 2 ? 0 : bits)), mask);
                    for (int t = 0; t < T; ++t) {
                        dot[h][t] = _mm256_add_epi16(dot[h][t], _mm256_maddubs_epi16(w, four(t, i)));
                        in_register(dot[h][t]);
                    }
                }
            }
            for (int t = 0; t < T; ++t) {
                const __m256i offset =
                    _mm256_set1_epi32(TYPE == GGML_TYPE_Q4_0 ? token(t)->minus_8_sum : token(t)->minus_sum);
                for (int h = 0; h < H; ++h) {
                    dot[h][t] = _mm256_add_epi32(_mm256_madd_epi16(dot[h][t], ones), offset);
                }
            }
        }
    }

    // The octets from FIRST on, H at once: there are 16 registers.
    template <ggml_type TYPE, int T, int FIRST, int H>
    static MOBILELLM_INLINE void octets(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride,
                                        int64_t rows) {
        __m256 sum[H][T];
        for (int h = 0; h < H; ++h) {
            for (int t = 0; t < T; ++t) {
                sum[h][t] = _mm256_setzero_ps();
            }
        }
        const uint8_t * pair = p.data;
        for (int64_t i = 0; i < p.n_pairs; ++i) {
            if (FIRST == 0) {
                prefetch<TYPE>(p, i);
            }
#pragma GCC unroll 2
            for (int second = 0; second < 2; ++second) {
                const auto *    a      = reinterpret_cast<const activations *>(q) + 2 * i + second;
                const uint8_t * scales = block_of<TYPE>(pair, second);
                __m256i         dot[H][T];
                block<TYPE, T, FIRST, H>(scales + SCALES, second, a, q_size, dot);
                for (int h = 0; h < H; ++h) {
                    const uint8_t * at    = scales + 16 * (FIRST + h);
                    const __m256    scale = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i *>(at)));
                    for (int t = 0; t < T; ++t) {
                        const auto * b =
                            reinterpret_cast<const activations *>(reinterpret_cast<const uint8_t *>(a) + t * q_size);
                        const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(dot[h][t]), _mm256_set1_ps(b->d));
                        sum[h][t]            = _mm256_fmadd_ps(product, scale, sum[h][t]);
                    }
                }
            }
            pair += pair_bytes<TYPE>();
        }
        for (int h = 0; h < H; ++h) {
            const int64_t row  = 8 * (FIRST + h);
            const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(rows - row)), lane);
            for (int t = 0; t < T; ++t) {
                _mm256_maskstore_ps(y + t * stride + row, mask, sum[h][t]);
            }
        }
        if constexpr (FIRST + H < OCTETS) {
            octets<TYPE, T, FIRST + H, H>(p, q, q_size, y, stride, rows);
        }
    }

    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        octets<TYPE, T, 0, T == 1 ? OCTETS : T == 2 ? 2 : 1>(p, q, q_size, y, stride, rows);
    }
};

void quantize(const float * x, int64_t n_cols, activations * out) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    for (int64_t b = 0; b < n_cols / BLOCK; ++b, x += BLOCK, ++out) {
        __m256  v[4];
        __m256i sizes = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {
            v[i]  = _mm256_loadu_ps(x + 8 * i);
            sizes = _mm256_max_epi32(sizes, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
        }
        // magnitudes compare as integers, infinities and NaNs above all others
        __m128i size = _mm_max_epi32(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
        size         = _mm_max_epi32(size, _mm_shuffle_epi32(size, 0x4E));
        size         = _mm_max_epi32(size, _mm_shuffle_epi32(size, 0xB1));

        const float largest = _mm_cvtss_f32(_mm_castsi128_ps(size));
        const bool  finite  = _mm_cvtsi128_si32(size) < 0x7F800000;

        __m256i n[4] = { _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                         _mm256_setzero_si256() };
        out->d       = finite ? 0.0f : __builtin_nanf("");
        if (finite && largest >= 1e-30f) {
            const __m256 factor = _mm256_set1_ps(127.0f / largest);
            for (int i = 0; i < 4; ++i) {
                n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], factor));
            }
            out->d = largest / 127.0f;
        }
        // packs works on halves of registers: put their fours in order again
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out->q),
                            _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));

        const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
        __m128i       sum  = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        sum                = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
        sum                = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
        set_sum(*out, _mm_cvtsi128_si32(sum));
    }
}

}  // namespace

extern const kernels avx2_kernels;
const kernels        avx2_kernels = { quantize, matmul<avx2_isa> };

}  // namespace mobilellm
