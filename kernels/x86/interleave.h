// What packing is mostly made of, in SSE2, which every x86-64 has.

#pragma once

#include <emmintrin.h>
#include <cstddef>
#include <cstdint>

namespace mobilellm {

namespace {

// WORDS times four bytes of each of 16 rows, one chunk after the other.
template <int WORDS>
void interleave(const uint8_t * rows, size_t row_size, uint8_t * chunks) {
    for (int64_t r = 0; r < 16; r += 4) {
        for (int i = 0; i < WORDS; i += 4) {
            const auto load = [&](int64_t k) {
                return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows + (r + k) * row_size + 4 * i));
            };
            const auto store = [&](int k, __m128i x) {
                _mm_storeu_si128(reinterpret_cast<__m128i *>(chunks + 64 * (i + k) + 4 * r), x);
            };
            const __m128i low01  = _mm_unpacklo_epi32(load(0), load(1));
            const __m128i low23  = _mm_unpacklo_epi32(load(2), load(3));
            const __m128i high01 = _mm_unpackhi_epi32(load(0), load(1));
            const __m128i high23 = _mm_unpackhi_epi32(load(2), load(3));
            store(0, _mm_unpacklo_epi64(low01, low23));
            store(1, _mm_unpackhi_epi64(low01, low23));
            store(2, _mm_unpacklo_epi64(high01, high23));
            store(3, _mm_unpackhi_epi64(high01, high23));
        }
    }
}

}  // namespace

}  // namespace mobilellm
