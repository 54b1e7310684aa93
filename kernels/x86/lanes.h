// The lanes of step/lanes.h in AVX2 and AVX-512. Only what the file's compiler flags allow is there.

#pragma once

#include "step/lanes.h"

#include <immintrin.h>

namespace {

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
struct avx2_lanes {
    using vec                       = __m256;
    static constexpr int  width     = 8;
    static constexpr int  group     = 3;
    static constexpr int  tile      = 4;
    static constexpr int  registers = 16;
    static constexpr bool by_lane   = false;

    static vec  zero() { return _mm256_setzero_ps(); }
    static vec  set1(float x) { return _mm256_set1_ps(x); }
    static vec  load(const float * p) { return _mm256_loadu_ps(p); }
    static void store(float * p, vec x) { _mm256_storeu_ps(p, x); }
    static vec  load_i8(const int8_t * p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
    }
    static vec load_f16(const uint8_t * p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static vec load_first_bf16(const uint8_t * p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)), 16));
    }
    static vec load_second_bf16(const uint8_t * p) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xFFFF0000))));
    }
    static vec set1_f16(const uint8_t * p) {
        int16_t half;
        std::memcpy(&half, p, sizeof(half));
        return _mm256_cvtph_ps(_mm_set1_epi16(half));
    }
    static ggml_fp16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
    static void        store_f16(uint8_t * p, vec x) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store_i8(int8_t * p, vec x) {
        const __m256i wide  = _mm256_cvtps_epi32(x);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(words, words));
    }
    static vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
    static vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
    static vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
    static vec div(vec a, vec b) { return _mm256_div_ps(a, b); }
    static vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
    static vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
    static vec select(uint64_t bits, vec x, vec y) {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits & 0xFF)), bit);
        return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
    }
    static vec butterfly(vec x, int h) {
        const __m256i lane  = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i bit   = _mm256_set1_epi32(h);
        const __m256i upper = _mm256_cmpeq_epi32(_mm256_and_si256(lane, bit), bit);
        const __m256i minus = _mm256_slli_epi32(upper, 31);
        return add(_mm256_permutevar8x32_ps(x, _mm256_xor_si256(lane, bit)),
                   _mm256_xor_ps(x, _mm256_castsi256_ps(minus)));
    }
    static float sum(vec a) {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x        = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    static float largest(vec a) {
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x        = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }
    static vec exp(vec x) {
        x           = _mm256_min_ps(set1(exp_high), _mm256_max_ps(set1(exp_low), x));
        const vec n = _mm256_round_ps(mul(x, set1(log2_e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const vec r = fma(n, set1(-ln2_low), fma(n, set1(-ln2_high), x));
        vec       y = set1(exp_taylor[0]);
        for (int i = 1; i < 8; ++i) {
            y = fma(y, r, set1(exp_taylor[i]));
        }
        const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return mul(y, _mm256_castsi256_ps(power));
    }
    static void sum4(vec a, vec b, vec c, vec d, float * out) {
        const vec x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
    }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
struct avx512_lanes {
    using vec                       = __m512;
    static constexpr int  width     = 16;
    static constexpr int  group     = 5;
    static constexpr int  tile      = 8;
    static constexpr int  registers = 32;
    static constexpr bool by_lane   = false;

    static vec  zero() { return _mm512_setzero_ps(); }
    static vec  set1(float x) { return _mm512_set1_ps(x); }
    static vec  load(const float * p) { return _mm512_loadu_ps(p); }
    static void store(float * p, vec x) { _mm512_storeu_ps(p, x); }
    static vec  load_i8(const int8_t * p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
    }
    static vec load_f16(const uint8_t * p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static vec load_first_bf16(const uint8_t * p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
    }
    static vec load_second_bf16(const uint8_t * p) {
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xFFFF0000))));
    }
    static vec set1_f16(const uint8_t * p) {
        int16_t half;
        std::memcpy(&half, p, sizeof(half));
        return _mm512_cvtph_ps(_mm256_set1_epi16(half));
    }
    static ggml_fp16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
    static void        store_f16(uint8_t * p, vec x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store_i8(int8_t * p, vec x) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
    }
    static vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
    static vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
    static vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
    static vec div(vec a, vec b) { return _mm512_div_ps(a, b); }
    static vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
    static vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
    static vec select(uint64_t bits, vec x, vec y) { return _mm512_mask_blend_ps(__mmask16(bits), y, x); }
    static vec butterfly(vec x, int h) {
        const __m512i   lane    = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i   bit     = _mm512_set1_epi32(h);
        const __mmask16 upper   = _mm512_test_epi32_mask(lane, bit);
        const vec       swapped = _mm512_permutexvar_ps(_mm512_xor_si512(lane, bit), x);
        return _mm512_mask_sub_ps(add(swapped, x), upper, swapped, x);
    }
    static float sum(vec a) { return _mm512_reduce_add_ps(a); }
    static float largest(vec a) { return _mm512_reduce_max_ps(a); }
    static vec   exp(vec x) {
        x           = _mm512_min_ps(set1(exp_high), _mm512_max_ps(set1(exp_low), x));
        const vec n = _mm512_roundscale_ps(mul(x, set1(log2_e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const vec r = fma(n, set1(-ln2_low), fma(n, set1(-ln2_high), x));
        vec       y = set1(exp_taylor[0]);
        for (int i = 1; i < 8; ++i) {
            y = fma(y, r, set1(exp_taylor[i]));
        }
        return _mm512_scalef_ps(y, n);
    }
    static void sum4(vec a, vec b, vec c, vec d, float * out) {
        const vec     ab   = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const vec     cd   = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        // every 128-bit lane: partial sums of a, b, c, d
        const __m512d low  = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const vec     x    = add(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        const __m256  y    = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
    }
};
#endif

}  // namespace
