// The two thin products of low_rank.h over any lanes of lanes.h. What a token gets does not depend on the others.

#pragma once

#include "fused_ops.h"
#include "lanes.h"

namespace {

using mobilellm::activations;
using mobilellm::input_rows;
using mobilellm::low_rank;

// Brings to the cache what is read some 30 lines later.
inline void prefetch_stream(const uint8_t * data, int64_t bytes) {
    for (int64_t offset = 0; offset < bytes; offset += 64) {
        __builtin_prefetch(data + 2048 + offset);
    }
}

// `width` elements of a half of a pair from number i on.
template <typename L, bool WIDE>
typename L::vec load_half(const uint8_t * half, int64_t i) {
    return WIDE ? L::load(reinterpret_cast<const float *>(half) + i) : L::load_f16(half + 2 * i);
}

// One token's `width` elements from e on of a block of 32.
template <typename L>
typename L::vec load_input(const activations * x, int64_t block, int64_t e) {
    return L::mul(L::load_i8(x[block].q + e), L::set1(x[block].d));
}

template <typename L>
typename L::vec load_input(const float * x, int64_t block, int64_t e) {
    return L::load(x + 32 * block + e);
}

// thin[t][r] for N tokens
template <typename L, bool WIDE, int N, typename T>
void reduce_tile(const low_rank & pair, const T * const * tokens, float * thin, int64_t stride) {
    using vec = typename L::vec;
    for (int64_t r = 0; r < mobilellm::padded_rank(pair.rank); r += 4) {
        vec sums[N][4];
        for (int t = 0; t < N; ++t) {
            for (int i = 0; i < 4; ++i) {
                sums[t][i] = L::zero();
            }
        }
        constexpr int64_t size = WIDE ? 4 : 2;
        const uint8_t *   rows = pair.a + size * r * pair.n_cols;
        for (int64_t block = 0; block < pair.n_cols / 32; ++block, rows += 128 * size) {
            prefetch_stream(rows, 128 * size);
            for (int64_t e = 0; e < 32; e += L::width) {
                vec x[N];
                for (int t = 0; t < N; ++t) {
                    x[t] = load_input<L>(tokens[t], block, e);
                }
                for (int i = 0; i < 4; ++i) {
                    const vec weights = load_half<L, WIDE>(rows, 32 * i + e);
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

// Rows of x are `size` bytes apart.
template <typename L, bool WIDE, typename T>
void reduce_rows(const low_rank & pair, const T * x, size_t size, int64_t n_tokens, float * thin, int64_t stride) {
    const auto token = [&](int64_t t) {
        return reinterpret_cast<const T *>(reinterpret_cast<const uint8_t *>(x) + t * size);
    };
    int64_t t = 0;
    for (; t + 2 <= n_tokens; t += 2) {
        const T * tokens[] = { token(t), token(t + 1) };
        reduce_tile<L, WIDE, 2>(pair, tokens, thin + t * stride, stride);
    }
    if (t < n_tokens) {
        const T * tokens[] = { token(t) };
        reduce_tile<L, WIDE, 1>(pair, tokens, thin + t * stride, stride);
    }
}

template <typename L>
void reduce_on(const low_rank & pair, const input_rows & x, int64_t n_tokens, float * thin, int64_t stride) {
    if (pair.wide) {
        reduce_rows<L, true>(pair, x.floats, pair.n_cols * sizeof(float), n_tokens, thin, stride);
    } else {
        reduce_rows<L, false>(pair, x.bytes, mobilellm::activation_size(pair.n_cols), n_tokens, thin, stride);
    }
}

// y[r] += the 32 rows of a group times thin, for one token
template <typename L, bool WIDE>
void expand_group(const uint8_t * columns, int64_t rank, const float * thin, float * y) {
    constexpr int N = 32 / L::width;

    typename L::vec sums[N];
    for (int i = 0; i < N; ++i) {
        sums[i] = L::load(y + i * L::width);
    }
    for (int64_t r = 0; r < rank; ++r) {
        const auto x = L::set1(thin[r]);
        for (int i = 0; i < N; ++i) {
            sums[i] = L::fma(load_half<L, WIDE>(columns, 32 * r + i * L::width), x, sums[i]);
        }
    }
    for (int i = 0; i < N; ++i) {
        L::store(y + i * L::width, sums[i]);
    }
}

template <typename L, bool WIDE>
void expand_groups(const low_rank & pair, int64_t g0, int64_t g1, const float * thin, int64_t thin_stride,
                   int64_t n_tokens, float * y, int64_t stride) {
    const int64_t bytes = (WIDE ? 4 : 2) * 32 * pair.rank;
    for (int64_t g = g0; g < g1; ++g) {
        const uint8_t * columns = pair.b + bytes * g;
        const int64_t   n_rows  = pair.n_rows - 32 * g < 32 ? pair.n_rows - 32 * g : 32;
        prefetch_stream(columns, bytes);
        for (int64_t t = 0; t < n_tokens; ++t) {
            float * out = y + t * stride + 32 * (g - g0);
            if (n_rows == 32) {
                expand_group<L, WIDE>(columns, pair.rank, thin + t * thin_stride, out);
                continue;
            }
            float rows[32] = {};
            std::memcpy(rows, out, n_rows * sizeof(float));
            expand_group<L, WIDE>(columns, pair.rank, thin + t * thin_stride, rows);
            std::memcpy(out, rows, n_rows * sizeof(float));
        }
    }
}

template <typename L>
void expand_on(const low_rank & pair, int64_t g0, int64_t g1, const float * thin, int64_t thin_stride, int64_t n_tokens,
               float * y, int64_t stride) {
    if (pair.wide) {
        expand_groups<L, true>(pair, g0, g1, thin, thin_stride, n_tokens, y, stride);
    } else {
        expand_groups<L, false>(pair, g0, g1, thin, thin_stride, n_tokens, y, stride);
    }
}

}  // namespace
