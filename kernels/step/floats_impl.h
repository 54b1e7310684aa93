// Products of packed floats (kernels.h), over any lanes of lanes.h. A row is summed in one chain, column by column,
// however many tokens there are: what a token gets does not depend on the others.

#pragma once

#include "fused_ops.h"
#include "lanes.h"

#include <cstring>

namespace {

using mobilellm::GROUP;
using mobilellm::matrix;
using mobilellm::streaming;

constexpr int64_t RUN = 16;  // columns between two looks at what is to be prefetched

// Bytes of two columns of a group.
template <ggml_type TYPE>
constexpr int64_t two_columns() {
    return 2 * GROUP * (TYPE == GGML_TYPE_F32 ? 4 : 2);
}

// `width` rows from row r on of the first or the second of two columns that begin at p.
template <typename L, ggml_type TYPE>
typename L::vec load_weights(const uint8_t * p, int column, int r) {
    if constexpr (TYPE == GGML_TYPE_F16) {
        return L::load_f16(p + 2 * (GROUP * column + r));
    } else if constexpr (TYPE == GGML_TYPE_BF16) {
        return column ? L::load_second_bf16(p + 4 * r) : L::load_first_bf16(p + 4 * r);
    } else {
        return L::load(reinterpret_cast<const float *>(p) + GROUP * column + r);
    }
}

// Not tiles.h's, which is inlined with a loop for each hint: with that one, or with this one inlined there, products of
// F16 and BF16 read 23 to 28 GB/s instead of 37 (Zen 4), and with this one in tiles.h Q8_0 17 instead of 38.
inline void prefetch_run(streaming::cache hint, const uint8_t * data, int64_t bytes) {
    for (int64_t offset = 0; offset < bytes; offset += 64) {
        switch (hint) {
            case streaming::none:
                return;
            case streaming::nta:
                __builtin_prefetch(data + offset, 0, 0);
                break;
            case streaming::t2:
                __builtin_prefetch(data + offset, 0, 1);
                break;
            case streaming::t1:
                __builtin_prefetch(data + offset, 0, 2);
                break;
            case streaming::t0:
                __builtin_prefetch(data + offset, 0, 3);
                break;
        }
    }
}

// What a product reads ahead of its group, which ends at `end`: what lies there or, `skip` bytes further on, elsewhere.
struct ahead {
    streaming::cache hint;
    int64_t          bytes;
    const uint8_t *  end;
    int64_t          skip;
};

// T tokens by the rows of a group from row FIRST on, as many at once as registers allow.
template <typename L, ggml_type TYPE, int T, int FIRST = 0>
void multiply_group(const uint8_t * group, const ahead & next, const float * x, int64_t n_cols, float * y,
                    int64_t stride, int64_t n_rows) {
    using vec             = typename L::vec;
    constexpr int VECTORS = GROUP / L::width;
    constexpr int FIT     = (L::registers - 1) / (T + 1);  // sums and weights, beside an element of a token
    constexpr int V       = FIT >= VECTORS ? VECTORS : FIT >= 8 ? 8 : FIT >= 4 ? 4 : 2;

    vec sums[T][V];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {  // unrolled, or GCC keeps the sums in memory
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            sums[t][v] = L::zero();
        }
    }
    const uint8_t * p = group;
    for (int64_t c = 0; c < n_cols; c += RUN) {
        if (FIRST == 0) {
            const uint8_t * then = p + next.bytes;
            prefetch_run(next.hint, then < next.end ? then : then + next.skip, RUN / 2 * two_columns<TYPE>());
        }
        for (int64_t i = c; i < c + RUN; i += 2, p += two_columns<TYPE>()) {
#pragma GCC unroll 2
            for (int column = 0; column < 2; ++column) {
                vec w[V];
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) {
                    w[v] = load_weights<L, TYPE>(p, column, FIRST + v * L::width);
                }
#pragma GCC unroll 12
                for (int t = 0; t < T; ++t) {
                    const vec a = L::set1(x[t * n_cols + i + column]);
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v) {
                        sums[t][v] = L::fma(w[v], a, sums[t][v]);
                    }
                }
            }
        }
    }
    float rows[T][V * L::width];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            L::store(rows[t] + v * L::width, sums[t][v]);
        }
    }
    const int64_t n = n_rows - FIRST < V * L::width ? n_rows - FIRST : V * L::width;
    for (int t = 0; n > 0 && t < T; ++t) {
        std::memcpy(y + t * stride + FIRST, rows[t], n * sizeof(float));
    }
    if constexpr (FIRST + V * L::width < GROUP) {
        multiply_group<L, TYPE, T, FIRST + V * L::width>(group, next, x, n_cols, y, stride, n_rows);
    }
}

template <typename L, ggml_type TYPE, int T>
void multiply_tile(int64_t n, const uint8_t * group, const ahead & next, const float * x, int64_t n_cols, float * y,
                   int64_t stride, int64_t n_rows) {
    if (n == T) {
        multiply_group<L, TYPE, T>(group, next, x, n_cols, y, stride, n_rows);
    } else if constexpr (T > 1) {
        multiply_tile<L, TYPE, T - 1>(n, group, next, x, n_cols, y, stride, n_rows);
    }
}

template <typename L, ggml_type TYPE>
void multiply_groups(const matrix & m, int64_t g0, int64_t g1, const float * x, int64_t n_tokens, float * y,
                     int64_t stride, const void * follows) {
    constexpr int TILE = L::width == 16 ? 12 : 6;  // tokens by two or more vectors of rows
    const int64_t size = m.n_cols / 2 * two_columns<TYPE>();
    const int64_t far  = 32 * m.stream.ahead * two_columns<TYPE>();
    for (int64_t g = g0; g < g1; ++g) {
        const uint8_t * group  = m.data + g * size;
        const uint8_t * end    = group + size;
        // `follows`, or once more what has just been read
        const int64_t   skip   = g + 1 < g1 ? 0 : (follows ? static_cast<const uint8_t *>(follows) : group) - end;
        const int64_t   n_rows = m.n_rows - g * GROUP < GROUP ? m.n_rows - g * GROUP : GROUP;
        for (int64_t t = 0; t < n_tokens; t += TILE) {
            const int64_t n    = n_tokens - t < TILE ? n_tokens - t : TILE;
            const bool    last = t + n == n_tokens;
            ahead         next = { m.stream.hint, far < size ? far : size, end, skip };
            if (n_tokens > TILE) {  // the last tile fetches the next group
                next.hint  = last ? streaming::t1 : streaming::none;
                next.bytes = size;
            }
            multiply_tile<L, TYPE, TILE>(n, group, next, x + t * m.n_cols, m.n_cols, y + t * stride + (g - g0) * GROUP,
                                         stride, n_rows);
        }
    }
}

template <typename L>
void multiply_floats(const matrix & m, int64_t g0, int64_t g1, const float * x, int64_t n_tokens, float * y,
                     int64_t stride, const void * next) {
    if (m.type == GGML_TYPE_F16) {
        multiply_groups<L, GGML_TYPE_F16>(m, g0, g1, x, n_tokens, y, stride, next);
    } else if (m.type == GGML_TYPE_BF16) {
        multiply_groups<L, GGML_TYPE_BF16>(m, g0, g1, x, n_tokens, y, stride, next);
    } else {
        multiply_groups<L, GGML_TYPE_F32>(m, g0, g1, x, n_tokens, y, stride, next);
    }
}

}  // namespace
