// Attention for several tokens at a time: the products of fused_ops.h's attention_tile as register-tiled
// matrix-matrix multiplications, softmax on the way (Milakov and Gimelshein, arXiv 1805.02867).
//
// What a token gets depends on nothing but the cells it sees, bit for bit: cells are taken in blocks of tile_cells
// positions, products are summed in the order of the list, and those of cells that it does not see are zero.

#pragma once

#include "cache_rows.h"
#include "fused_ops.h"
#include "lanes.h"

#include <cmath>
#include <cstring>

namespace {

using mobilellm::attention_tile;
using mobilellm::tile_cells;
using mobilellm::tile_tokens;

// c[r][n] = keep[r] c[r][n] + sum over k of a[r][k] b[k b_step + n] for L::tile rows and N vectors of n; without `keep`
// what was in c does not count. a[r][k] is at r a_row + k, n_steps dividing by 4, or at r + k a_step where a_row is 1.
template <typename L, int N>
inline void multiply_tile(const float * a, int64_t a_row, int64_t a_step, const float * b, int64_t b_step,
                          int64_t n_steps, float * c, int64_t c_row, const float * keep) {
    using vec = typename L::vec;

    vec sums[L::tile][N];
    for (int r = 0; r < L::tile; ++r) {
        for (int n = 0; n < N; ++n) {
            sums[r][n] = keep ? L::mul(L::set1(keep[r]), L::load(c + r * c_row + n * L::width)) : L::zero();
        }
    }
    const auto step = [&](int64_t k, auto of_row) __attribute__((always_inline)) {
        vec v[N];
        for (int n = 0; n < N; ++n) {
            v[n] = L::load(b + k * b_step + n * L::width);
        }
        for (int r = 0; r < L::tile; ++r) {
            for (int n = 0; n < N; ++n) {
                sums[r][n] = of_row(r, v[n], sums[r][n]);
            }
        }
    };
    if constexpr (!L::by_lane) {
        for (int64_t k = 0; k < n_steps; ++k) {
            step(k, [&](int r, vec v, vec sum)
                        __attribute__((always_inline)) { return L::fma(L::set1(a[r * a_row + k * a_step]), v, sum); });
        }
    } else if (a_step == 1) {
        for (int64_t k = 0; k < n_steps; k += 4) {
            vec x[L::tile];
            for (int r = 0; r < L::tile; ++r) {
                x[r] = L::load_whole(a + r * a_row + k);
            }
            for (int i = 0; i < 4; ++i) {
                step(k + i, [&](int r, vec v, vec sum)
                                __attribute__((always_inline)) { return L::fma_lane(x[r], i, v, sum); });
            }
        }
    } else {
        for (int64_t k = 0; k < n_steps; ++k) {
            vec x[L::tile / L::width];
            for (int i = 0; i < L::tile / L::width; ++i) {
                x[i] = L::load_whole(a + k * a_step + i * L::width);
            }
            step(k, [&](int r, vec v, vec sum)
                        __attribute__((always_inline)) { return L::fma_lane(x[r / L::width], r % L::width, v, sum); });
        }
    }
    for (int r = 0; r < L::tile; ++r) {
        for (int n = 0; n < N; ++n) {
            L::store(c + r * c_row + n * L::width, sums[r][n]);
        }
    }
}

// The same for n_rows (a multiple of L::tile) and `columns` (of L::width).
template <typename L>
void multiply_add(const float * a, int64_t a_row, int64_t a_step, int64_t n_rows, const float * b, int64_t b_step,
                  int64_t n_steps, int64_t columns, float * c, int64_t c_row, const float * keep) {
    for (int64_t r = 0; r < n_rows; r += L::tile) {
        const float * rows = a + r * a_row;
        const float * kept = keep ? keep + r : nullptr;

        int64_t n = 0;
        for (; n + 2 * L::width <= columns; n += 2 * L::width) {
            multiply_tile<L, 2>(rows, a_row, a_step, b + n, b_step, n_steps, c + r * c_row + n, c_row, kept);
        }
        if (n < columns) {
            multiply_tile<L, 1>(rows, a_row, a_step, b + n, b_step, n_steps, c + r * c_row + n, c_row, kept);
        }
    }
}

// What is known of the scores of one query head so far, by token.
struct running_softmax {
    float largest[tile_tokens];
    float sum[tile_tokens];
    float keep[tile_tokens];  // what the last block made of all before it
};

// Cells [from, to) of a block: some token of a few sees the first and the last of them.
struct some_cells {
    int64_t from;
    int64_t to;
};

// Those that `width` tokens see whose bits begin with `bit`.
some_cells cells_seen(const uint64_t * seen, int64_t n_cells, int64_t bit, int64_t width) {
    const uint64_t who   = ~uint64_t(0) >> (64 - width) << bit;
    some_cells     cells = { 0, n_cells };
    while (cells.to > 0 && !(seen[cells.to - 1] & who)) {
        --cells.to;
    }
    while (cells.from < cells.to && !(seen[cells.from] & who)) {
        ++cells.from;
    }
    return cells;
}

// scores (cells, tile_tokens) -> exp(score - largest), zero where a token does not see the cell; tokens [t0, t1)
template <typename L>
void soften_block(float * scores, const uint64_t * seen, int64_t first_bit, some_cells cells, bool all_seen, int64_t t0,
                  int64_t t1, running_softmax & state) {
    const auto lowest = L::set1(-1e30f);
    for (int64_t t = t0; t < t1; t += L::width) {
        const auto before = L::load(state.largest + t);
        auto       high   = before;
        for (int64_t c = cells.from; c < cells.to; ++c) {
            const auto x = L::load(scores + c * tile_tokens + t);
            high         = L::max(high, all_seen ? x : L::select(seen[c] >> (first_bit + t), x, lowest));
        }
        const auto keep = L::exp(L::sub(before, high));
        auto       sum  = L::mul(L::load(state.sum + t), keep);
        for (int64_t c = cells.from; c < cells.to; ++c) {
            float * score = scores + c * tile_tokens + t;
            auto    p     = L::exp(L::sub(L::load(score), high));
            if (!all_seen) {
                p = L::select(seen[c] >> (first_bit + t), p, L::zero());
            }
            L::store(score, p);
            sum = L::add(sum, p);
        }
        L::store(state.largest + t, high);
        L::store(state.sum + t, sum);
        L::store(state.keep + t, keep);
    }
}

// Zero times what is not finite is not zero: such rows become zero, and the result is who sees one of them.
template <typename L>
uint64_t clear_not_finite(float * rows, const uint64_t * seen, int64_t n_cells, int64_t n_embd_head) {
    const auto finite = [&](int64_t first, int64_t last) {
        auto sum = L::zero();
        for (int64_t i = first * n_embd_head; i < last * n_embd_head; i += L::width) {
            const auto x = L::load(rows + i);
            sum          = L::add(sum, L::sub(x, x));
        }
        return L::sum(sum) == 0.0f;
    };
    uint64_t who = 0;
    if (!finite(0, n_cells)) {
        for (int64_t c = 0; c < n_cells; ++c) {
            if (!finite(c, c + 1)) {
                std::memset(rows + c * n_embd_head, 0, n_embd_head * sizeof(float));
                who |= seen[c];
            }
        }
    }
    return who;
}

template <typename L>
void attend_tile_on(const attention_tile & a) {
    constexpr int64_t T   = tile_tokens;
    constexpr int     pad = L::width > L::tile ? L::width : L::tile;
    constexpr int64_t few = 2 * L::width > L::tile ? 2 * L::width : L::tile;  // tokens that have their cells together

    const int64_t n        = a.n_embd_head;
    const int64_t padded   = (a.n_tokens + pad - 1) / pad * pad;  // tokens
    const auto    everyone = ~uint64_t(0) >> (64 - a.n_tokens) << a.first_bit;
    uint64_t      spoilt   = 0;  // who sees a V that is not finite

    float * k      = a.work;
    float * v      = k + tile_cells * n;
    float * scores = v + tile_cells * n;
    float * q      = scores + tile_cells * T;  // (n_group, n_embd_head, T)
    float * out    = q + a.n_group * n * T;    // (n_group, T, n_embd_head)
    auto *  states = reinterpret_cast<running_softmax *>(out + a.n_group * n * T);

    for (int g = 0; g < a.n_group; ++g) {
        for (int64_t t = 0; t < padded; ++t) {
            const float * x = a.q + t * a.q_stride + g * n;
            for (int64_t e = 0; e < n; ++e) {
                q[(g * n + e) * T + t] = t < a.n_tokens ? x[e] : 0.0f;
            }
            states[g].largest[t] = -1e30f;
            states[g].sum[t]     = 0.0f;
        }
        std::memset(out + g * n * T, 0, padded * n * sizeof(float));
    }

    for (int64_t first = 0, last; first < a.n_cells; first = last) {
        const auto block = [&](int64_t i) { return a.positions[a.cells[i]] / tile_cells; };
        uint64_t   seen  = everyone;
        for (last = first; last < a.n_cells && last < first + tile_cells && block(last) == block(first); ++last) {
            seen &= a.seen[last];
        }
        const int64_t n_cells = last - first;
        const int64_t rows    = (n_cells + L::tile - 1) / L::tile * L::tile;
        read_cells<L>(a.k, a.cells + first, n_cells, n, k);
        read_cells<L>(a.v, a.cells + first, n_cells, n, v);
        spoilt |= clear_not_finite<L>(v, a.seen + first, n_cells, n);
        std::memset(k + n_cells * n, 0, (rows - n_cells) * n * sizeof(float));

        some_cells cells[T / few + 1];
        const auto each_few = [&](auto f) {
            for (int64_t t = 0; t < padded; t += few) {
                f(cells[t / few], t, t + few < padded ? t + few : padded);
            }
        };
        each_few(
            [&](some_cells & c, int64_t t, int64_t) { c = cells_seen(a.seen + first, n_cells, a.first_bit + t, few); });
        for (int g = 0; g < a.n_group; ++g) {
            each_few([&](some_cells c, int64_t t, int64_t end) {
                const int64_t from = c.from / L::tile * L::tile;
                const int64_t to   = (c.to + L::tile - 1) / L::tile * L::tile;
                multiply_add<L>(k + from * n, n, 1, to - from, q + g * n * T + t, T, n, end - t, scores + from * T + t,
                                T, nullptr);
                soften_block<L>(scores, a.seen + first, a.first_bit, c, seen == everyone, t, end, states[g]);
            });
            each_few([&](some_cells c, int64_t t, int64_t end) {
                multiply_add<L>(scores + c.from * T + t, 1, T, end - t, v + c.from * n, n, c.to - c.from, n,
                                out + (g * T + t) * n, n, states[g].keep + t);
            });
        }
    }

    for (int g = 0; g < a.n_group; ++g) {
        for (int64_t t = 0; t < a.n_tokens; ++t) {
            const bool    bad   = spoilt >> (a.first_bit + t) & 1;
            const auto    total = L::set1(bad ? NAN : states[g].sum[t]);
            const float * x     = out + (g * T + t) * n;
            float *       y     = a.out + t * a.out_stride + g * n;
            for (int64_t e = 0; e < n; e += L::width) {
                L::store(y + e, L::div(L::load(x + e), total));
            }
        }
    }
}

}  // namespace
