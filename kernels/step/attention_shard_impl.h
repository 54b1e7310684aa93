// Attention of one token over a shard of the cells, fused_ops.h's attention_shard, over any lanes of lanes.h: softmax
// on the way (Milakov and Gimelshein, arXiv 1805.02867), a block of cells and a KV head at a time. What is read next is
// fetched meanwhile: rows of other heads lie between those of one, which defeats the processor's own prefetching.
//
// A head gets the same bits whichever heads are computed with it.

#pragma once

#include "cache_rows.h"
#include "fused_ops.h"
#include "lanes.h"

#include <cmath>
#include <type_traits>

namespace {

using mobilellm::attention_shard;

// Rows of one KV head.
struct cell_rows {
    const uint8_t * row(int64_t i) const { return data + cells[i] * cell; }

    // Row i, if there is one, to the second-level cache. (To the first, so far ahead, costs Zen 4 half of the gain. And
    // GCC takes calls of a function that only prefetches for dead.)
    __attribute__((always_inline)) void fetch(int64_t i) const {
        for (int64_t offset = 0; i < n && offset < bytes; offset += 64) {
            __builtin_prefetch(row(i) + offset, 0, 2);
        }
    }

    const uint8_t * data;
    int64_t         cell;
    const int32_t * cells;
    int64_t         n;
    int64_t         bytes;  // of a row
};

// scores[g][i] = q[g] . K[i]; four cells at a time, so up to three values past the last are written
template <typename L, template <typename> class Reader, int G>
void score(const float * q, int64_t n_embd_head, const cell_rows & k, const cell_rows & next, float * scores) {
    using vec = typename L::vec;

    for (int64_t i = 0; i < k.n; i += 4) {
        const uint8_t * rows[4];
        for (int c = 0; c < 4; ++c) {
            rows[c] = k.row(i + c < k.n ? i + c : k.n - 1);
            next.fetch(i + c);
        }
        vec sums[G][4];
        for (int g = 0; g < G; ++g) {
            for (int c = 0; c < 4; ++c) {
                sums[g][c] = L::zero();
            }
        }
        for (int64_t block = 0; block < n_embd_head; block += 32) {
            for (int e = 0; e < 32; e += L::width) {
                for (int c = 0; c < 4; ++c) {
                    const vec row = Reader<L>::load(Reader<L>::at(rows[c], block), e);
                    for (int g = 0; g < G; ++g) {
                        sums[g][c] = L::fma(L::load(q + g * n_embd_head + block + e), row, sums[g][c]);
                    }
                }
            }
        }
        for (int g = 0; g < G; ++g) {
            L::sum4(sums[g][0], sums[g][1], sums[g][2], sums[g][3], scores + g * mobilellm::max_scores + i);
        }
    }
    for (int64_t i = (k.n + 3) / 4 * 4; i < next.n; ++i) {
        next.fetch(i);
    }
}

// out[g][e] = keep[g] out[g][e] + sum over cells of p[g][i] V[i][e], elements from e on, in N vectors; without `keep`
// what was in out does not count
template <typename L, template <typename> class Reader, int G, int N>
void gather(const float * p, const float * keep, int64_t n_embd_head, const cell_rows & v, const cell_rows & next,
            int64_t e, float * out) {
    using vec = typename L::vec;

    const int64_t within = N * L::width % 32 == 0 ? 0 : e % 32;  // where the elements begin in their 32
    vec           sums[G][N];
    for (int g = 0; g < G; ++g) {
        for (int i = 0; i < N; ++i) {
            sums[g][i] = keep ? L::mul(L::set1(keep[g]), L::load(out + g * n_embd_head + e + i * L::width)) : L::zero();
        }
    }
    for (int64_t c = 0; c < v.n; ++c) {
        const uint8_t * from = Reader<L>::at(v.row(c), e - within);
        if (e == 0) {
            next.fetch(c);
        }
        for (int i = 0; i < N; ++i) {
            const vec value = Reader<L>::load(from, within + i * L::width);
            for (int g = 0; g < G; ++g) {
                sums[g][i] = L::fma(L::set1(p[g * mobilellm::max_scores + c]), value, sums[g][i]);
            }
        }
    }
    for (int64_t c = v.n; e == 0 && c < next.n; ++c) {
        next.fetch(c);
    }
    for (int g = 0; g < G; ++g) {
        for (int i = 0; i < N; ++i) {
            L::store(out + g * n_embd_head + e + i * L::width, sums[g][i]);
        }
    }
}

template <typename L, template <typename> class Reader, int G>
void gather_rows(const float * p, const float * keep, int64_t n_embd_head, const cell_rows & v, const cell_rows & next,
                 float * out) {
    constexpr int N = 4;

    int64_t e = 0;
    for (; e + N * L::width <= n_embd_head; e += N * L::width) {
        gather<L, Reader, G, N>(p, keep, n_embd_head, v, next, e, out);
    }
    for (; e < n_embd_head; e += L::width) {
        gather<L, Reader, G, 1>(p, keep, n_embd_head, v, next, e, out);
    }
}

// scores -> exp(score - largest), with what is known of all blocks so far; what those before are to be multiplied by
template <typename L>
float soften(float * scores, int64_t n, bool first, float & largest, float & sum) {
    const int64_t vectors = n / L::width * L::width;
    auto          most    = L::set1(-INFINITY);
    for (int64_t i = 0; i < vectors; i += L::width) {
        most = L::max(most, L::load(scores + i));
    }
    float high = L::largest(most);
    for (int64_t i = vectors; i < n; ++i) {
        high = high > scores[i] ? high : scores[i];
    }
    high             = first || high > largest ? high : largest;
    const float keep = first || high == largest ? 1.0f : expf(largest - high);

    const int64_t padded = (n + L::width - 1) / L::width * L::width;
    for (int64_t i = n; i < padded; ++i) {
        scores[i] = high;  // exp of it is not used
    }
    for (int64_t i = 0; i < padded; i += L::width) {
        L::store(scores + i, L::exp(L::sub(L::load(scores + i), L::set1(high))));
    }
    for (int64_t i = n; i < padded; ++i) {
        scores[i] = 0.0f;
    }
    auto total = L::zero();
    for (int64_t i = 0; i < padded; i += L::width) {
        total = L::add(total, L::load(scores + i));
    }
    sum     = first ? L::sum(total) : keep * sum + L::sum(total);
    largest = high;
    return keep;
}

// A block of cells of one KV head, for G of the query heads that share it, from `from` on of all.
template <typename L, int G>
void attend_block(const attention_shard & a, const cell_rows & k, const cell_rows & v, const cell_rows & next_k,
                  const cell_rows & next_v, int from, bool first) {
    const float * q   = a.q + from * a.n_embd_head;
    float *       out = a.out + from * a.n_embd_head;
    float         keeps[G];
    const float * keep = first ? nullptr : keeps;

    switch (a.k.type) {
        case GGML_TYPE_F32:
            score<L, read_f32, G>(q, a.n_embd_head, k, next_k, a.scores);
            break;
        case GGML_TYPE_F16:
            score<L, read_f16, G>(q, a.n_embd_head, k, next_k, a.scores);
            break;
        default:
            score<L, read_q8_0, G>(q, a.n_embd_head, k, next_k, a.scores);
    }
    for (int g = 0; g < G; ++g) {
        keeps[g] = soften<L>(a.scores + g * mobilellm::max_scores, k.n, first, a.largest[from + g], a.sum[from + g]);
    }
    switch (a.v.type) {
        case GGML_TYPE_F32:
            gather_rows<L, read_f32, G>(a.scores, keep, a.n_embd_head, v, next_v, out);
            break;
        case GGML_TYPE_F16:
            gather_rows<L, read_f16, G>(a.scores, keep, a.n_embd_head, v, next_v, out);
            break;
        default:
            gather_rows<L, read_q8_0, G>(a.scores, keep, a.n_embd_head, v, next_v, out);
    }
}

template <typename L>
void attend_on(const attention_shard & a) {
    struct place {
        int64_t head;
        int64_t first;  // cell
        int64_t end;
    };
    constexpr int four  = L::group < 4 ? L::group : 4;
    const int64_t block = mobilellm::max_scores;
    const auto    rows  = [&](const head_cache & cache, const place & at) {
        const int64_t n = at.end - at.first < block ? at.end - at.first : block;
        return cell_rows{ cache.data + at.head * cache.head, cache.cell, a.cells + at.first, n, cache.head };
    };
    // what no reader knows, as rows of floats
    int32_t    numbers[mobilellm::max_scores];
    const auto ready = [&](const head_cache & cache, const cell_rows & stored, float * floats) {
        if (is_read(cache.type)) {
            return stored;
        }
        head_cache head = cache;
        head.data       = stored.data;
        read_cells<L>(head, stored.cells, stored.n, a.n_embd_head, floats);
        for (int32_t i = 0; i < stored.n; ++i) {
            numbers[i] = i;
        }
        const int64_t row = a.n_embd_head * int64_t(sizeof(float));
        return cell_rows{ reinterpret_cast<const uint8_t *>(floats), row, numbers, stored.n, row };
    };
    attention_shard as_read = a;
    as_read.k.type          = is_read(a.k.type) ? a.k.type : GGML_TYPE_F32;
    as_read.v.type          = is_read(a.v.type) ? a.v.type : GGML_TYPE_F32;
    for (int64_t first = 0; first < a.n_cells; first += block) {
        for (int h = 0; h < a.n_heads; ++h) {
            const place here   = { a.first_head + h, first, a.n_cells };
            // the same cells of the next head, the next cells of this shard, or those of the next one from head 0 on
            const place next   = h + 1 < a.n_heads           ? place{ here.head + 1, first, a.n_cells }
                                 : first + block < a.n_cells ? place{ a.first_head, first + block, a.n_cells }
                                                             : place{ 0, a.n_cells, a.n_cells + a.n_next };
            auto        k      = rows(a.k, here);
            auto        v      = rows(a.v, here);
            auto        next_k = rows(a.k, next);
            auto        next_v = rows(a.v, next);
            for (int64_t i = 0; a.begins && first == 0 && h == 0 && i < k.n; ++i) {
                k.fetch(i);
                v.fetch(i);
            }
            k = ready(a.k, k, a.rows);
            v = ready(a.v, v, a.rows + mobilellm::max_scores * a.n_embd_head);
            for (int g = 0; g < a.n_group;) {
                const int  n    = a.n_group - g < L::group ? a.n_group - g : L::group;
                const auto some = [&](auto N) {
                    attend_block<L, decltype(N)::value>(as_read, k, v, next_k, next_v, h * a.n_group + g, first == 0);
                };
                switch (n) {
                    case 1:
                        some(std::integral_constant<int, 1>());
                        break;
                    case 2:
                        some(std::integral_constant<int, 2>());
                        break;
                    case 3:
                        some(std::integral_constant<int, 3>());
                        break;
                    case 4:
                        some(std::integral_constant<int, four>());
                        break;
                    default:
                        some(std::integral_constant<int, L::group>());
                }
                g += n;
                next_k.n = next_v.n = 0;  // they are on their way
            }
        }
    }
}

}  // namespace
