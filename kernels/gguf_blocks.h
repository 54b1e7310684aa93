// What a block of a row consists of in GGUF, and its quants as bytes. Only for packing.cpp.

#pragma once

#include "form.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mobilellm {

namespace {

// Where a row's block has its parts in GGUF: halves, smaller scales and the planes of its quants. Byte l of the nibbles
// of `span` columns holds columns l and span / 2 + l.
struct stored {
    int bytes;
    int halves;
    int subs;
    int ones;
    int pairs;
    int nibbles;
    int span;
};

constexpr stored stored_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q2_0:
            return { 18, 0, 0, 0, 2, 0, 0 };
        case GGML_TYPE_Q5_0:
            return { 22, 0, 0, 2, 0, 6, 32 };
        case GGML_TYPE_Q5_1:
            return { 24, 0, 0, 4, 0, 8, 32 };
        case GGML_TYPE_Q8_0:
            return { 34, 0, 0, 0, 0, 0, 0 };  // the quants follow
        case GGML_TYPE_Q4_1:
            return { 20, 0, 0, 0, 0, 4, 32 };
        case GGML_TYPE_IQ4_XS:
            return { 136, 0, 2, 0, 0, 8, 32 };
        case GGML_TYPE_Q3_K:
            return { 110, 108, 96, 0, 32, 0, 0 };
        case GGML_TYPE_Q4_K:
            return { 144, 0, 4, 0, 0, 16, 64 };
        case GGML_TYPE_Q5_K:
            return { 176, 0, 4, 16, 0, 48, 64 };
        case GGML_TYPE_Q6_K:
            return { 210, 208, 192, 0, 128, 0, 128 };
        default:
            return { 18, 0, 0, 0, 0, 2, 32 };
    }
}

// Calls f(column, byte of the plane, bit in it) for every column of a block.
template <ggml_type TYPE, int BITS, class F>
inline void each_column(F f) {
    constexpr int columns = form_of(TYPE).columns;
    if constexpr (BITS == 4) {
        constexpr int half = stored_of(TYPE).span / 2;
        for (int c = 0; c < columns; c += 2 * half) {
            for (int l = 0; l < half; ++l) {
                f(c + l, c / 2 + l, 0);
                f(c + half + l, c / 2 + l, 4);
            }
        }
    } else if constexpr (columns < 256) {
        for (int c = 0; c < columns; ++c) {
            f(c, c * BITS / 8, c * BITS % 8);
        }
    } else {  // runs of 32 bytes
        for (int first = 0; first < columns * BITS / 8; first += 32) {
            for (int bit = 0; bit < 8; bit += BITS) {
                for (int l = 0; l < 32; ++l) {
                    f(first * 8 / BITS + bit / BITS * 32 + l, first + l, bit);
                }
            }
        }
    }
}

// The bits of a byte (or its pairs) as bytes, the first one first.
template <int BITS>
inline uint64_t spread(uint64_t x) {
    if (BITS == 2) {
        x = (x | x << 12) & 0x000F000F;
        return (x | x << 6) & 0x03030303;
    }
    x = (x | x << 28) & 0x0000000F0000000F;
    x = (x | x << 14) & 0x0003000300030003;
    return (x | x << 7) & 0x0101010101010101;
}

// Adds a plane to the quants of a block, `to` bits further up.
template <ggml_type TYPE, int BITS>
inline void read_plane(const uint8_t * plane, int to, uint8_t * q) {
    constexpr int columns = form_of(TYPE).columns;
    if constexpr (BITS == 4) {  // always the first
        each_column<TYPE, 4>([&](int c, int i, int bit) { q[c] = plane[i] >> bit & 15; });
    } else if constexpr (columns < 256) {
        for (int i = 0; i < columns * BITS / 8; ++i, q += 8 / BITS) {
            uint64_t quants = 0;
            std::memcpy(&quants, q, 8 / BITS);
            quants |= spread<BITS>(plane[i]) << to;
            std::memcpy(q, &quants, 8 / BITS);
        }
    } else {
        each_column<TYPE, BITS>([&](int c, int i, int bit) { q[c] |= (plane[i] >> bit & ((1 << BITS) - 1)) << to; });
    }
}

// In GGUF all quants lie in planes.
constexpr bool stores_plane(const form & f, int bits) {
    return f.bits & bits;
}

// The quants of a block in GGUF, a byte each.
template <ggml_type TYPE>
inline void read_quants(const uint8_t * block, uint8_t * q) {
    constexpr form   F = form_of(TYPE);
    constexpr stored S = stored_of(TYPE);
    if constexpr (F.bits == 8) {
        std::memcpy(q, block + 2, F.columns);
    } else if constexpr (stores_plane(F, 4)) {
        read_plane<TYPE, 4>(block + S.nibbles, 0, q);
    } else {
        std::memset(q, 0, F.columns);
    }
    if constexpr (stores_plane(F, 2)) {
        read_plane<TYPE, 2>(block + S.pairs, plane_bit(F, 2), q);
    }
    if constexpr (stores_plane(F, 1)) {
        read_plane<TYPE, 1>(block + S.ones, plane_bit(F, 1), q);
    }
}

template <ggml_type TYPE>
void write_quants(const uint8_t * q, uint8_t * block) {
    constexpr form   F = form_of(TYPE);
    constexpr stored S = stored_of(TYPE);
    if constexpr (F.bits == 8) {
        std::memcpy(block + 2, q, F.columns);
    }
    if constexpr (stores_plane(F, 4)) {
        each_column<TYPE, 4>([&](int c, int i, int bit) { block[S.nibbles + i] |= (q[c] & 15) << bit; });
    }
    if constexpr (stores_plane(F, 2)) {
        constexpr int from = plane_bit(F, 2);
        each_column<TYPE, 2>([&](int c, int i, int bit) { block[S.pairs + i] |= (q[c] >> from & 3) << bit; });
    }
    if constexpr (stores_plane(F, 1)) {
        constexpr int from = plane_bit(F, 1);
        each_column<TYPE, 1>([&](int c, int i, int bit) { block[S.ones + i] |= (q[c] >> from & 1) << bit; });
    }
}

}  // namespace

}  // namespace mobilellm
