// Readers of what a KV cache holds, over any lanes of lanes.h.

#pragma once

#include "lanes.h"

namespace {

// Bytes of a row of n elements, a multiple of 32.
inline int64_t row_bytes(ggml_type type, int64_t n) {
    return type == GGML_TYPE_F32 ? 4 * n : type == GGML_TYPE_F16 ? 2 * n : n / 32 * 34;
}

// readers of one contiguous row as floats: `at` is where the 32 elements from e on begin, `load` reads `width` elements
// of what begins there, from element i on
template <typename L>
struct read_f32 {
    static const uint8_t * at(const uint8_t * row, int64_t e) { return row + 4 * e; }

    static typename L::vec load(const uint8_t * from, int64_t i) {
        return L::load(reinterpret_cast<const float *>(from) + i);
    }
};

template <typename L>
struct read_f16 {
    static const uint8_t * at(const uint8_t * row, int64_t e) { return row + 2 * e; }

    static typename L::vec load(const uint8_t * from, int64_t i) { return L::load_f16(from + 2 * i); }
};

// blocks of 32: an fp16 scale, then 32 int8
template <typename L>
struct read_q8_0 {
    static const uint8_t * at(const uint8_t * row, int64_t e) { return row + e / 32 * 34; }

    static typename L::vec load(const uint8_t * from, int64_t i) {
        const uint8_t * block = from + i / 32 * 34;
        return L::mul(L::load_i8(reinterpret_cast<const int8_t *>(block + 2 + i % 32)), L::set1_f16(block));
    }
};

}  // namespace
