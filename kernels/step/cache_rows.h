// Readers of what a KV cache holds, over any lanes of lanes.h.

#pragma once

#include "fused_ops.h"
#include "lanes.h"

namespace {

using mobilellm::head_cache;

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

// Whether there is one of the readers above.
inline bool is_read(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0;
}

// The rows of n cells as floats, (n, n_embd_head).
template <typename L, template <typename> class Reader>
void read_cells(const head_cache & cache, const int32_t * cells, int64_t n, int64_t n_embd_head, float * out) {
    for (int64_t c = 0; c < n; ++c, out += n_embd_head) {
        const uint8_t * row = cache.data + cells[c] * cache.cell;
        for (int64_t block = 0; block < n_embd_head; block += 32) {
            for (int e = 0; e < 32; e += L::width) {
                L::store(out + block + e, Reader<L>::load(Reader<L>::at(row, block), e));
            }
        }
    }
}

template <typename L>
void read_cells(const head_cache & cache, const int32_t * cells, int64_t n, int64_t n_embd_head, float * out) {
    switch (cache.type) {
        case GGML_TYPE_F32:
            return read_cells<L, read_f32>(cache, cells, n, n_embd_head, out);
        case GGML_TYPE_F16:
            return read_cells<L, read_f16>(cache, cells, n, n_embd_head, out);
        case GGML_TYPE_Q8_0:
            return read_cells<L, read_q8_0>(cache, cells, n, n_embd_head, out);
        default:
            for (int64_t c = 0; c < n; ++c) {
                ggml_get_type_traits(cache.type)
                    ->to_float(cache.data + cells[c] * cache.cell, out + c * n_embd_head, n_embd_head);
            }
    }
}

}  // namespace
