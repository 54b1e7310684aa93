// AVX2: a register is 8 rows × 4 columns, half a chunk; an octet is 8 rows of a group. Quants are used unsigned and
// summed in 16 bits for as many columns as fit (4 bits: 16 · 15 · 127 a lane); what makes weights of them is taken off
// after. Bytes are multiplied as |w| · sign(a, w), which does not saturate even at w = -128, and summed in 32 bits.

#include "tiles.h"

#include <immintrin.h>

namespace mobilellm {

namespace {

struct avx2_isa {
    static constexpr int TILE     = 4;
    static constexpr int ARRANGED = 0;
    static constexpr int OCTETS   = GROUP / 8;

    // the half of a chunk where an octet's rows lie
    static MOBILELLM_INLINE __m256i half_of(const uint8_t * chunk, int octet) {
        return _mm256_load_si256(reinterpret_cast<const __m256i *>(chunk + 32 * (octet % 2)));
    }

    // GCC would sum all products of a block at its end and run out of registers.
    static MOBILELLM_INLINE void in_register(__m256i & sum) { __asm__("" : "+x"(sum)); }

    // BITS bits of each byte of x, from bit `from` on, at bit `to`
    template <int BITS>
    static MOBILELLM_INLINE __m256i bits_of(__m256i x, int from, int to) {
        const __m256i moved = from > to ? _mm256_srli_epi16(x, from - to) : _mm256_slli_epi16(x, to - from);
        return _mm256_and_si256(moved, _mm256_set1_epi8(char(((1 << BITS) - 1) << to)));
    }

    // Whether weights are bytes with a sign, by which they are multiplied.
    template <ggml_type TYPE>
    static constexpr bool has_sign() {
        return form_of(TYPE).bits == 8 || form_of(TYPE).table;
    }

    // Columns 4i to 4i + 3 of an octet.
    template <ggml_type TYPE>
    static MOBILELLM_INLINE __m256i quants(const square<TYPE> & w, int i, int octet) {
        constexpr form F    = form_of(TYPE);
        const int      high = octet / 2;
        if constexpr (F.bits == 8) {
            return half_of(w.chunk(8, 2 * i + high), octet);
        }
        if constexpr (has_rest(F)) {
            constexpr int rest = rest_bits(F);
            const __m256i both = half_of(w.bytes(i), octet);
            if (!high) {
                return bits_of<F.bits>(both, 0, 0);
            }
            return _mm256_or_si256(bits_of<8 - F.bits>(both, F.bits, rest),
                                   bits_of<rest>(half_of(w.rests(i), octet), i * rest % 8, 0));
        }
        __m256i q = _mm256_setzero_si256();
        if constexpr (has_plane(F, 4)) {
            q = bits_of<4>(half_of(w.chunk(4, i), octet), 4 * high, 0);
        }
        if constexpr (has_plane(F, 2)) {
            const int from = 4 * w.in_second + 2 * high;
            q              = _mm256_or_si256(q, bits_of<2>(half_of(w.chunk(2, i), octet), from, plane_bit(F, 2)));
        }
        if constexpr (has_plane(F, 1)) {
            q = _mm256_or_si256(q, bits_of<1>(half_of(w.chunk(1, high), octet), i, plane_bit(F, 1)));
        }
        if constexpr (F.table) {
            const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(TABLE));
            q = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_xor_si128(table, _mm_set1_epi8(-128))), q);
        }
        return q;
    }

    // dot[h][t] of H octets of a group from octet FIRST on, over the columns from c on that share a scale.
    template <ggml_type TYPE, int T, int FIRST, int H>
    static MOBILELLM_INLINE void products(const square<TYPE> & w, int c, const activations * q, size_t q_size,
                                          __m256i dot[H][T]) {
        constexpr form F   = form_of(TYPE);
        // fours of columns whose products fit 16 bits
        constexpr int  FIT = F.bits == 6 ? 2 : F.bits == 5 ? 4 : 8;
        constexpr int  N   = F.scaled / 4 < FIT ? F.scaled / 4 : FIT;

        const auto token = [&](int t) {
            return reinterpret_cast<const activations *>(reinterpret_cast<const uint8_t *>(q) + t * q_size);
        };
        const auto four = [&](int t, int i) {
            return _mm256_set1_epi32(reinterpret_cast<const int32_t *>(token(t)->q)[i]);
        };
        const __m256i ones = _mm256_set1_epi16(1);
        for (int t = 0; t < T; ++t) {
            const int32_t sum    = F.scaled == BLOCK ? token(t)->minus_sum
                                   : c == 0          ? token(t)->minus_first_sum
                                                     : token(t)->minus_sum - token(t)->minus_first_sum;
            const __m256i offset = _mm256_set1_epi32(has_sign<TYPE>() ? 0 : F.offset * sum);
            for (int h = 0; h < H; ++h) {
                dot[h][t] = offset;
            }
        }
        if constexpr (has_sign<TYPE>()) {
#pragma GCC unroll 8
            for (int i = c / 4; i < (c + F.scaled) / 4; ++i) {
                for (int h = 0; h < H; ++h) {
                    const __m256i x    = quants<TYPE>(w, i, FIRST + h);
                    const __m256i size = _mm256_abs_epi8(x);
                    for (int t = 0; t < T; ++t) {
                        const __m256i product = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(t, i), x));
                        dot[h][t]             = _mm256_add_epi32(dot[h][t], _mm256_madd_epi16(product, ones));
                        in_register(dot[h][t]);
                    }
                }
            }
            return;
        }
#pragma GCC unroll 4
        for (int n = 0; n < F.scaled / 4; n += N) {
            __m256i sum[H][T];
            for (int h = 0; h < H; ++h) {
                for (int t = 0; t < T; ++t) {
                    sum[h][t] = _mm256_setzero_si256();
                }
            }
#pragma GCC unroll 8
            for (int i = c / 4 + n; i < c / 4 + n + N; ++i) {
                for (int h = 0; h < H; ++h) {
                    const __m256i x = quants<TYPE>(w, i, FIRST + h);
                    for (int t = 0; t < T; ++t) {
                        sum[h][t] = _mm256_add_epi16(sum[h][t], _mm256_maddubs_epi16(x, four(t, i)));
                        in_register(sum[h][t]);
                    }
                }
            }
            for (int h = 0; h < H; ++h) {
                for (int t = 0; t < T; ++t) {
                    dot[h][t] = _mm256_add_epi32(dot[h][t], _mm256_madd_epi16(sum[h][t], ones));
                }
            }
        }
    }

    // Of an octet: the scales of column c, or the minima.
    template <ggml_type TYPE>
    static MOBILELLM_INLINE __m256 scales(const square<TYPE> & w, int c, bool least, int octet) {
        const uint8_t * halves = w.halves + 64 * least + 16 * octet;
        const __m256    scale  = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i *>(halves)));
        if constexpr (form_of(TYPE).subs == 0) {
            return scale;
        }
        const auto * smaller = reinterpret_cast<const __m128i *>(w.smaller_of(c, least) + 8 * octet);
        return _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(smaller))));
    }

    // The octets from FIRST on, H at once: there are 16 registers.
    template <ggml_type TYPE, int T, int FIRST, int H>
    static MOBILELLM_INLINE void octets(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride,
                                        int64_t rows) {
        constexpr form F = form_of(TYPE);

        __m256 sum[H][T];
        for (int h = 0; h < H; ++h) {
            for (int t = 0; t < T; ++t) {
                sum[h][t] = _mm256_setzero_ps();
            }
        }
        each_square<TYPE, FIRST == 0>(p, q, [&](const square<TYPE> & w, const activations * a) MOBILELLM_ALWAYS {
            const auto token = [&](int t) {
                return reinterpret_cast<const activations *>(reinterpret_cast<const uint8_t *>(a) + t * q_size);
            };
#pragma GCC unroll 2
            for (int c = 0; c < BLOCK; c += F.scaled) {
                __m256i dot[H][T];
                products<TYPE, T, FIRST, H>(w, c, a, q_size, dot);
                for (int h = 0; h < H; ++h) {
                    const __m256 scale = scales<TYPE>(w, c, false, FIRST + h);
                    for (int t = 0; t < T; ++t) {
                        const __m256 product =
                            _mm256_mul_ps(_mm256_cvtepi32_ps(dot[h][t]), _mm256_set1_ps(token(t)->d));
                        sum[h][t] = _mm256_fmadd_ps(product, scale, sum[h][t]);
                    }
                    if constexpr (F.halves == 2) {
                        const __m256 least = scales<TYPE>(w, c, true, FIRST + h);
                        for (int t = 0; t < T; ++t) {
                            const __m256 all = _mm256_set1_ps(float(token(t)->minus_sum) * token(t)->d);
                            sum[h][t]        = F.subs ? _mm256_fmadd_ps(all, least, sum[h][t])  // which is taken off
                                                      : _mm256_fnmadd_ps(all, least, sum[h][t]);
                        }
                    }
                }
            }
        });
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
