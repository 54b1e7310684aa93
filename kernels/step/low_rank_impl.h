// The two thin products of low_rank.h over any lanes of lanes.h. What a token gets does not depend on the others.

#pragma once

#include "fused_ops.h"
#include "lanes.h"

namespace {

using mobilellm::activations;
using mobilellm::low_rank;

// Brings to the cache what is read some 30 lines later.
inline void prefetch_stream(const uint8_t * data, int64_t bytes) {
    for (int64_t offset = 0; offset < bytes; offset += 64) {
        __builtin_prefetch(data + 2048 + offset);
    }
}

// thin[t][r] for N tokens
template <typename L, int N>
void reduce_tile(const low_rank & pair, const uint8_t * const * tokens, float * thin, int64_t stride) {
    using vec = typename L::vec;
    for (int64_t r = 0; r < mobilellm::padded_rank(pair.rank); r += 4) {
        vec sums[N][4];
        for (int t = 0; t < N; ++t) {
            for (int i = 0; i < 4; ++i) {
                sums[t][i] = L::zero();
            }
        }
        const uint8_t * rows = pair.a + 2 * r * pair.n_cols;
        for (int64_t block = 0; block < pair.n_cols / 32; ++block, rows += 256) {
            prefetch_stream(rows, 256);
            for (int64_t e = 0; e < 32; e += L::width) {
                vec x[N];
                for (int t = 0; t < N; ++t) {
                    const auto & a = reinterpret_cast<const activations *>(tokens[t])[block];
                    x[t]           = L::mul(L::load_i8(a.q + e), L::set1(a.d));
                }
                for (int i = 0; i < 4; ++i) {
                    const vec weights = L::load_f16(rows + 2 * (32 * i + e));
                    for (int t = 0; t < N; ++t) {
                        sums[t][i] = L::fma(weights, x[t], sums[t][i]);
                    }
                }
            }
        }
        for (int t = 0; t < N; ++t) {
            float * out = thin + t * stride + r;
            L::sum4(sums[t][0], sums[t][1], sums[t][2], sums[t][3], out);
            for (int i = 0; i < 4; ++i) {
                out[i] *= pair.powers[r + i] * pair.scale;
            }
        }
    }
}

template <typename L>
void reduce_on(const low_rank & pair, const activations * x, int64_t n_tokens, float * thin, int64_t stride) {
    const size_t    size = mobilellm::activation_size(pair.n_cols);
    const uint8_t * q    = reinterpret_cast<const uint8_t *>(x);

    int64_t t = 0;
    for (; t + 2 <= n_tokens; t += 2) {
        const uint8_t * tokens[] = { q + t * size, q + (t + 1) * size };
        reduce_tile<L, 2>(pair, tokens, thin + t * stride, stride);
    }
    if (t < n_tokens) {
        const uint8_t * tokens[] = { q + t * size };
        reduce_tile<L, 1>(pair, tokens, thin + t * stride, stride);
    }
}

// y[r] += the 32 rows of a group times thin, for one token
template <typename L>
void expand_group(const uint8_t * columns, int64_t rank, const float * thin, float * y) {
    constexpr int N = 32 / L::width;

    typename L::vec sums[N];
    for (int i = 0; i < N; ++i) {
        sums[i] = L::load(y + i * L::width);
    }
    for (int64_t r = 0; r < rank; ++r) {
        const auto x = L::set1(thin[r]);
        for (int i = 0; i < N; ++i) {
            sums[i] = L::fma(L::load_f16(columns + 2 * (32 * r + i * L::width)), x, sums[i]);
        }
    }
    for (int i = 0; i < N; ++i) {
        L::store(y + i * L::width, sums[i]);
    }
}

template <typename L>
void expand_on(const low_rank & pair, int64_t g0, int64_t g1, const float * thin, int64_t thin_stride, int64_t n_tokens,
               float * y, int64_t stride) {
    for (int64_t g = g0; g < g1; ++g) {
        const uint8_t * columns = pair.b + 2 * 32 * pair.rank * g;
        const int64_t   n_rows  = pair.n_rows - 32 * g < 32 ? pair.n_rows - 32 * g : 32;
        prefetch_stream(columns, 64 * pair.rank);
        for (int64_t t = 0; t < n_tokens; ++t) {
            float * out = y + t * stride + 32 * (g - g0);
            if (n_rows == 32) {
                expand_group<L>(columns, pair.rank, thin + t * thin_stride, out);
                continue;
            }
            float rows[32] = {};
            std::memcpy(rows, out, n_rows * sizeof(float));
            expand_group<L>(columns, pair.rank, thin + t * thin_stride, rows);
            std::memcpy(out, rows, n_rows * sizeof(float));
        }
    }
}

}  // namespace
