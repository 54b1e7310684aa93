// Readers of what a KV cache holds, over any lanes of lanes.h.

#pragma once

#include "lanes.h"

namespace {

// readers of one contiguous row: `width` elements from element e on, as floats
template <typename L>
struct read_f32 {
    static constexpr int64_t bits = 32;  // an element

    static typename L::vec load(const uint8_t * row, int64_t e) {
        return L::load(reinterpret_cast<const float *>(row) + e);
    }
};

template <typename L>
struct read_f16 {
    static constexpr int64_t bits = 16;

    static typename L::vec load(const uint8_t * row, int64_t e) { return L::load_f16(row + 2 * e); }
};

// blocks of 32: an fp16 scale, then 32 int8
template <typename L>
struct read_q8_0 {
    static constexpr int64_t bits = 9;  // rounded up

    static typename L::vec load(const uint8_t * row, int64_t e) {
        const uint8_t * block = row + e / 32 * 34;
        return L::mul(L::load_i8(reinterpret_cast<const int8_t *>(block + 2 + e % 32)), L::set1_f16(block));
    }
};

}  // namespace
