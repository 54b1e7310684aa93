// LoRA pairs as the fused step multiplies by them: b (n_rows, rank) times a (rank, n_cols), beside a matrix of
// (n_rows, n_cols). Beside a matrix of quants both halves are FP16, whatever the adapter's file has: its values keep 11
// bits, which is more than the activations have. Beside floats, whose activations are floats, they are FP32. A power of
// two taken out of each row of a and column of b keeps them in FP16's range.
//
// Packed, one after the other: a power of two for each row of a, FP32; a, four rows side by side, 32 columns of each;
// and b with its 32 rows of a group (kernels.h) side by side, one column after the other. So both are read as a stream.
// Rows of a are filled up with zeros to a multiple of 4.

#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace mobilellm {

// static: files with instruction-set flags of their own have a copy each
static constexpr int64_t padded_rank(int64_t rank) {
    return (rank + 3) / 4 * 4;
}

struct low_rank {
    const float *   powers;  // (padded rank)
    bool            wide;    // FP32
    const uint8_t * a;       // (padded rank / 4, n_cols / 32, 4, 32)
    const uint8_t * b;       // (groups, rank, 32)
    int64_t         n_cols;
    int64_t         n_rows;
    int64_t         rank;
    float           scale;  // of the product
};

// Bytes of the packed pair. a is (n_cols, rank) and b (rank, n_rows) as in ggml, rows without gaps, of any types.
size_t low_rank_size(const ggml_tensor * a, const ggml_tensor * b, bool wide);

// `packed` holds low_rank_size bytes, 64-byte aligned.
void pack_low_rank(const ggml_tensor * a, const ggml_tensor * b, bool wide, void * packed);

low_rank as_low_rank(const void * packed, int64_t n_cols, int64_t n_rows, int64_t rank, bool wide, float scale);

}  // namespace mobilellm
