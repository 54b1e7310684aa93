#include "low_rank.h"

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace mobilellm {

namespace {

std::vector<float> floats(const ggml_tensor * t) {
    std::vector<float> values(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        std::memcpy(values.data(), t->data, ggml_nbytes(t));
    } else {
        ggml_get_type_traits(t->type)->to_float(t->data, values.data(), values.size());
    }
    return values;
}

// The exponent by which n values, `step` apart, lie below 1.
int exponent(const float * x, int64_t n, int64_t step) {
    float largest = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        largest = std::max(largest, std::fabs(x[i * step]));
    }
    int result = 0;
    std::frexp(largest, &result);
    return result;
}

void store(float x, int power, bool wide, uint8_t * out, int64_t i) {
    const float       value = std::ldexp(x, -power);
    const ggml_fp16_t half  = ggml_fp32_to_fp16(value);
    if (wide) {
        std::memcpy(out + 4 * i, &value, sizeof(value));
    } else {
        std::memcpy(out + 2 * i, &half, sizeof(half));
    }
}

}  // namespace

size_t low_rank_size(const ggml_tensor * a, const ggml_tensor * b, bool wide) {
    const int64_t rank = padded_rank(a->ne[1]);
    return rank * sizeof(float) + (wide ? 4 : 2) * (rank * a->ne[0] + n_groups_of(b->ne[1]) * GROUP * a->ne[1]);
}

void pack_low_rank(const ggml_tensor * a, const ggml_tensor * b, bool wide, void * packed) {
    const int64_t            n_cols = a->ne[0];
    const int64_t            n_rows = b->ne[1];
    const int64_t            rank   = a->ne[1];
    const std::vector<float> rows   = floats(a);
    const std::vector<float> others = floats(b);

    std::memset(packed, 0, low_rank_size(a, b, wide));
    const low_rank pair   = as_low_rank(packed, n_cols, n_rows, rank, wide, 1.0f);
    auto * const   powers = static_cast<float *>(packed);
    auto * const   to_a   = const_cast<uint8_t *>(pair.a);
    auto * const   to_b   = const_cast<uint8_t *>(pair.b);
    for (int64_t r = 0; r < rank; ++r) {
        const int of_a = exponent(rows.data() + r * n_cols, n_cols, 1);
        const int of_b = exponent(others.data() + r, n_rows, rank);
        powers[r]      = std::ldexp(1.0f, of_a + of_b);
        for (int64_t c = 0; c < n_cols; ++c) {
            const int64_t at = 4 * (r / 4 * n_cols + c / 32 * 32) + r % 4 * 32 + c % 32;
            store(rows[r * n_cols + c], of_a, wide, to_a, at);
        }
        for (int64_t i = 0; i < n_rows; ++i) {
            store(others[i * rank + r], of_b, wide, to_b, (i / GROUP * rank + r) * GROUP + i % GROUP);
        }
    }
}

low_rank as_low_rank(const void * packed, int64_t n_cols, int64_t n_rows, int64_t rank, bool wide, float scale) {
    const auto * powers = static_cast<const float *>(packed);
    const auto * a      = reinterpret_cast<const uint8_t *>(powers + padded_rank(rank));
    return { powers, wide, a, a + (wide ? 4 : 2) * padded_rank(rank) * n_cols, n_cols, n_rows, rank, scale };
}

}  // namespace mobilellm
