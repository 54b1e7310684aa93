// fused_ops.h over any lanes of lanes.h. Included by one file an instruction set.

#pragma once

#include "attention_tile_impl.h"
#include "cache_rows.h"
#include "fused_ops.h"
#include "lanes.h"
#include "low_rank_impl.h"

#include <cmath>

namespace {

using mobilellm::attention_shard;
using mobilellm::head_cache;

// Rows of other heads lie between those of this one, which defeats the processor's own prefetching.
constexpr int64_t cells_ahead = 16;

template <typename L, template <typename> class Reader>
inline void prefetch_row(const attention_shard & a, const head_cache & cache, int64_t i) {
    const uint8_t * row = cache.data + a.cells[i < a.n_cells ? i : a.n_cells - 1] * cache.cell;
    for (int64_t offset = 0; offset < a.n_embd_head * Reader<L>::bits / 8; offset += 64) {
#ifdef __GNUC__
        __builtin_prefetch(row + offset);
#endif
    }
}

// scores[g][i] = q[g] . K[cells[i]]; four cells at a time, so up to three values past the last are written
template <typename L, template <typename> class Reader, int G>
void score(const attention_shard & a, const float * q, float * scores) {
    using vec       = typename L::vec;
    const int64_t n = a.n_embd_head;

    for (int64_t i = 0; i < a.n_cells; i += 4) {
        const uint8_t * rows[4];
        for (int c = 0; c < 4; ++c) {
            const int64_t cell = i + c < a.n_cells ? i + c : a.n_cells - 1;
            rows[c]            = a.k.data + a.cells[cell] * a.k.cell;
            prefetch_row<L, Reader>(a, a.k, i + c + cells_ahead);
        }
        vec sums[G][4];
        for (int g = 0; g < G; ++g) {
            for (int c = 0; c < 4; ++c) {
                sums[g][c] = L::zero();
            }
        }
        for (int64_t e = 0; e < n; e += L::width) {
            vec k[4];
            for (int c = 0; c < 4; ++c) {
                k[c] = Reader<L>::load(rows[c], e);
            }
            for (int g = 0; g < G; ++g) {
                const vec x = L::load(q + g * n + e);
                for (int c = 0; c < 4; ++c) {
                    sums[g][c] = L::fma(x, k[c], sums[g][c]);
                }
            }
        }
        for (int g = 0; g < G; ++g) {
            L::sum4(sums[g][0], sums[g][1], sums[g][2], sums[g][3], scores + g * a.n_scores + i);
        }
    }
}

// out[g][e] = sum over cells of p[g][i] V[cells[i]][e], elements from e on, in N vectors
template <typename L, template <typename> class Reader, int G, int N>
void gather(const attention_shard & a, const float * p, int64_t e, float * out) {
    using vec = typename L::vec;

    vec sums[G][N];
    for (int g = 0; g < G; ++g) {
        for (int i = 0; i < N; ++i) {
            sums[g][i] = L::zero();
        }
    }
    for (int64_t c = 0; c < a.n_cells; ++c) {
        const uint8_t * row = a.v.data + a.cells[c] * a.v.cell;
        vec             v[N];
        if (e == 0) {
            prefetch_row<L, Reader>(a, a.v, c + cells_ahead);
        }
        for (int i = 0; i < N; ++i) {
            v[i] = Reader<L>::load(row, e + i * L::width);
        }
        for (int g = 0; g < G; ++g) {
            const vec x = L::set1(p[g * a.n_scores + c]);
            for (int i = 0; i < N; ++i) {
                sums[g][i] = L::fma(x, v[i], sums[g][i]);
            }
        }
    }
    for (int g = 0; g < G; ++g) {
        for (int i = 0; i < N; ++i) {
            L::store(out + g * a.n_embd_head + e + i * L::width, sums[g][i]);
        }
    }
}

template <typename L, template <typename> class Reader, int G>
void gather_rows(const attention_shard & a, const float * p, float * out) {
    constexpr int N = 4;

    int64_t e = 0;
    for (; e + N * L::width <= a.n_embd_head; e += N * L::width) {
        gather<L, Reader, G, N>(a, p, e, out);
    }
    for (; e < a.n_embd_head; e += L::width) {
        gather<L, Reader, G, 1>(a, p, e, out);
    }
}

// the same where the cells of an element are contiguous, in the same order whether the cells are neighbours or not
template <typename L, template <typename> class Reader, int G>
void gather_columns(const attention_shard & a, const float * p, float * out) {
    using vec = typename L::vec;

    const int64_t vectors    = a.n_cells / L::width * L::width;
    bool          neighbours = true;
    for (int64_t i = 1; i < a.n_cells; ++i) {
        neighbours = neighbours && a.cells[i] == a.cells[i - 1] + 1;
    }
    for (int64_t e = 0; e < a.n_embd_head; ++e) {
        const uint8_t * row = a.v.data + e * a.v.element;
        const auto      one = [&](int64_t i) { return Reader<scalar_lanes>::load(row + a.cells[i] * a.v.cell, 0); };
        vec             sums[G];
        for (int g = 0; g < G; ++g) {
            sums[g] = L::zero();
        }
        for (int64_t i = 0; i < vectors; i += L::width) {
            float apart[L::width];
            for (int k = 0; !neighbours && k < L::width; ++k) {
                apart[k] = one(i + k);
            }
            const vec v = neighbours ? Reader<L>::load(row + a.cells[0] * a.v.cell, i) : L::load(apart);
            for (int g = 0; g < G; ++g) {
                sums[g] = L::fma(L::load(p + g * a.n_scores + i), v, sums[g]);
            }
        }
        for (int g = 0; g < G; ++g) {
            float sum = L::sum(sums[g]);
            for (int64_t i = vectors; i < a.n_cells; ++i) {
                sum += p[g * a.n_scores + i] * one(i);
            }
            out[g * a.n_embd_head + e] = sum;
        }
    }
}

// scores -> exp(score - largest), its sum
template <typename L>
void soften(float * scores, int64_t n, float * largest, float * sum) {
    constexpr float lowest = -INFINITY;

    const int64_t vectors = n / L::width * L::width;
    auto          high    = L::set1(lowest);
    for (int64_t i = 0; i < vectors; i += L::width) {
        high = L::max(high, L::load(scores + i));
    }
    *largest = L::largest(high);
    for (int64_t i = vectors; i < n; ++i) {
        *largest = *largest > scores[i] ? *largest : scores[i];
    }
    const int64_t padded = (n + L::width - 1) / L::width * L::width;
    for (int64_t i = n; i < padded; ++i) {
        scores[i] = *largest;  // exp of it is not used
    }
    for (int64_t i = 0; i < padded; i += L::width) {
        L::store(scores + i, L::exp(L::sub(L::load(scores + i), L::set1(*largest))));
    }
    for (int64_t i = n; i < padded; ++i) {
        scores[i] = 0.0f;
    }
    auto total = L::zero();
    for (int64_t i = 0; i < padded; i += L::width) {
        total = L::add(total, L::load(scores + i));
    }
    *sum = L::sum(total);
}

template <typename L>
struct fused_ops_on {
    static void add(float * x, const float * y, int64_t n) {
        for (int64_t i = 0; i < n; i += L::width) {
            L::store(x + i, L::add(L::load(x + i), L::load(y + i)));
        }
    }

    static void rms_norm(const float * x, const float * weight, int64_t n, float eps, float * y) {
        // two chains: additions wait for each other
        auto even = L::zero();
        auto odd  = L::zero();
        for (int64_t i = 0; i < n; i += 2 * L::width) {
            const auto a = L::load(x + i);
            even         = L::fma(a, a, even);
            if (i + L::width < n) {
                const auto b = L::load(x + i + L::width);
                odd          = L::fma(b, b, odd);
            }
        }
        const auto scale = L::set1(1.0f / sqrtf(L::sum(L::add(even, odd)) / float(n) + eps));
        for (int64_t i = 0; i < n; i += L::width) {
            const auto normed = L::mul(L::load(x + i), scale);
            L::store(y + i, weight ? L::mul(normed, L::load(weight + i)) : normed);
        }
    }

    static void silu_mul(const float * gate, const float * up, int64_t n, float * y) {
        for (int64_t i = 0; i < n; i += L::width) {
            const auto g = L::load(gate + i);
            const auto s = L::div(g, L::add(L::set1(1.0f), L::exp(L::sub(L::zero(), g))));
            L::store(y + i, L::mul(s, L::load(up + i)));
        }
    }

    static void hadamard(float * x, int64_t n, int64_t size) {
        const auto norm = L::set1(1.0f / sqrtf(float(size)));
        for (float * end = x + n; x < end; x += size) {
            for (int64_t i = 0; i < size; i += L::width) {
                auto v = L::mul(L::load(x + i), norm);
                for (int h = 1; h < L::width; h *= 2) {
                    v = L::butterfly(v, h);
                }
                L::store(x + i, v);
            }
            for (int64_t h = L::width; h < size; h *= 2) {
                for (int64_t i = 0; i < size; i += 2 * h) {
                    for (int64_t j = i; j < i + h; j += L::width) {
                        const auto a = L::load(x + j);
                        const auto b = L::load(x + j + h);
                        L::store(x + j, L::add(a, b));
                        L::store(x + j + h, L::sub(a, b));
                    }
                }
            }
        }
    }

    static void store(const float * x, int64_t n, ggml_type type, uint8_t * out) {
        if (type == GGML_TYPE_F32) {
            std::memcpy(out, x, n * sizeof(float));
        } else if (type == GGML_TYPE_F16) {
            for (int64_t i = 0; i < n; i += L::width) {
                L::store_f16(out + 2 * i, L::load(x + i));
            }
        } else {
            for (; n > 0; n -= 32, x += 32, out += 34) {
                auto high = L::zero();
                for (int i = 0; i < 32; i += L::width) {
                    const auto a = L::load(x + i);
                    high         = L::max(high, L::max(a, L::sub(L::zero(), a)));
                }
                const float       largest = L::largest(high);
                const auto        factor  = L::set1(largest > 0.0f ? 127.0f / largest : 0.0f);
                const ggml_fp16_t scale   = L::to_f16(largest / 127.0f);
                std::memcpy(out, &scale, sizeof(scale));
                for (int i = 0; i < 32; i += L::width) {
                    L::store_i8(reinterpret_cast<int8_t *>(out + 2 + i), L::mul(L::load(x + i), factor));
                }
            }
        }
    }

    template <int G>
    static void attend_heads(const attention_shard & a, int first) {
        const float * q      = a.q + first * a.n_embd_head;
        float *       scores = a.scores + first * a.n_scores;
        float *       out    = a.out + first * a.n_embd_head;

        switch (a.k.type) {
            case GGML_TYPE_F32:
                score<L, read_f32, G>(a, q, scores);
                break;
            case GGML_TYPE_F16:
                score<L, read_f16, G>(a, q, scores);
                break;
            default:
                score<L, read_q8_0, G>(a, q, scores);
        }
        for (int g = 0; g < G; ++g) {
            soften<L>(scores + g * a.n_scores, a.n_cells, a.largest + first + g, a.sum + first + g);
        }
        switch (a.v.type) {
            case GGML_TYPE_F32:
                a.v.transposed ? gather_columns<L, read_f32, G>(a, scores, out)
                               : gather_rows<L, read_f32, G>(a, scores, out);
                break;
            case GGML_TYPE_F16:
                a.v.transposed ? gather_columns<L, read_f16, G>(a, scores, out)
                               : gather_rows<L, read_f16, G>(a, scores, out);
                break;
            default:
                gather_rows<L, read_q8_0, G>(a, scores, out);
        }
    }

    static void attend(const attention_shard & a) {
        for (int first = 0; first < a.n_group;) {
            const int n = a.n_group - first < L::group ? a.n_group - first : L::group;
            switch (n) {
                case 1:
                    attend_heads<1>(a, first);
                    break;
                case 2:
                    attend_heads<2>(a, first);
                    break;
                case 3:
                    attend_heads<3>(a, first);
                    break;
                case 4:
                    attend_heads < L::group<4 ? L::group : 4>(a, first);
                    break;
                default:
                    attend_heads<L::group>(a, first);
            }
            first += n;
        }
    }

    static void combine(const float * out, const float * largest, const float * sum, int n_shards, int64_t stride,
                        int64_t n_head, int64_t n_embd_head, float * y) {
        for (int64_t h = 0; h < n_head; ++h) {
            float high = largest[h];
            for (int s = 1; s < n_shards; ++s) {
                high = high > largest[s * n_head + h] ? high : largest[s * n_head + h];
            }
            float weights[mobilellm::max_shards];
            float total = 0.0f;
            for (int s = 0; s < n_shards; ++s) {
                weights[s] = expf(largest[s * n_head + h] - high);
                total += weights[s] * sum[s * n_head + h];
            }
            for (int64_t e = h * n_embd_head; e < (h + 1) * n_embd_head; e += L::width) {
                auto x = L::zero();
                for (int s = 0; s < n_shards; ++s) {
                    x = L::fma(L::set1(weights[s] / total), L::load(out + s * stride + e), x);
                }
                L::store(y + e, x);
            }
        }
    }

    static constexpr mobilellm::fused_ops table = {
        add, rms_norm, silu_mul, hadamard, store, attend, combine, attend_tile_on<L>, reduce_on<L>, expand_on<L>,
    };
};

}  // namespace
