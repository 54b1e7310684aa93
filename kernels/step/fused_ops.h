// The arithmetic between the matrices of a step, one table of functions an instruction set. Single-threaded: who
// computes what is decided in fused_rows.cpp and fused_tokens.cpp.

#pragma once

#include "ggml.h"
#include "kernels.h"
#include "low_rank.h"

#include <cstddef>
#include <cstdint>

namespace mobilellm {

// Where a KV head of a cache lies: the row of cell c at data + c * cell.
struct head_cache {
    const uint8_t * data;
    ggml_type       type;  // that ggml turns into floats and back. It is faster for F32, F16 and Q8_0
    int64_t         cell;
    int64_t         head;    // bytes to the next KV head
    int64_t         stream;  // bytes to the next stream, which has as many cells of its own
};

constexpr int     max_shards = 8;  // of attention over the cells
// Of a query head: cells whose scores are computed before their values are added. Their rows fit into the first-level
// cache, and fetching the next ones takes as long as computing.
constexpr int64_t max_scores = 64;

// Attention of some KV heads, each with the n_group query heads that share it, over some cells.
struct attention_shard {
    int64_t         n_embd_head;  // a multiple of 32
    int             first_head;
    int             n_heads;
    int             n_group;
    const float *   q;  // (n_heads, n_group, n_embd_head), scaled
    head_cache      k;  // of head 0
    head_cache      v;
    const int32_t * cells;  // in the order of their positions
    int64_t         n_cells;
    // only says what to prefetch: whether these cells are the first of several calls, and how many that follow in the
    // list are next, from head 0 on
    bool            begins;
    int64_t         n_next;

    float * scores;   // scratch, (n_group, max_scores)
    float * rows;     // scratch, (2, max_scores, n_embd_head)
    float * out;      // (n_heads, n_group, n_embd_head): sum over cells of exp(score - largest) v
    float * largest;  // (n_heads, n_group)
    float * sum;      // (n_heads, n_group): sum over cells of exp(score - largest)
};

constexpr int64_t tile_tokens = 48;  // at most, of an attention_tile
constexpr int64_t tile_cells  = 64;

// Attention of the n_group query heads that share one KV head, for several tokens at a time.
struct attention_tile {
    int64_t          n_embd_head;  // a multiple of 32
    int              n_group;
    int64_t          n_tokens;  // 1 to tile_tokens
    const float *    q;         // (n_tokens, n_group, n_embd_head), scaled; tokens lie q_stride floats apart
    int64_t          q_stride;
    head_cache       k;
    head_cache       v;
    const int32_t *  cells;      // all that any of the tokens sees, in the order of their positions
    const int32_t *  positions;  // by cell
    const uint64_t * seen;       // (n_cells) bit first_bit + t: token t sees the cell
    int64_t          first_bit;
    int64_t          n_cells;

    float * work;  // scratch, attention_tile_work floats
    float * out;   // (n_tokens, n_group, n_embd_head), tokens out_stride apart
    int64_t out_stride;
};

// Floats of `work`.
constexpr int64_t attention_tile_work(int64_t n_embd_head, int64_t n_group) {
    return 2 * tile_cells * n_embd_head + tile_cells * tile_tokens + n_group * tile_tokens * (2 * n_embd_head + 3);
}

// Rows that matrices are multiplied with, in the forms that the matrices take: activations for quants, floats for
// floats. A form that none of them takes is not there.
struct input_rows {
    activations * bytes;   // activation_size apart
    float *       floats;  // without gaps
};

// Vectors have a multiple of 16 elements.
struct fused_ops {
    void (*add)(float * x, const float * y, int64_t n);  // x += y
    // y = x / sqrt(mean(x^2) + eps) * weight; without a weight where it is null
    void (*rms_norm)(const float * x, const float * weight, int64_t n, float eps, float * y);
    void (*silu_mul)(const float * gate, const float * up, int64_t n, float * y);  // silu(gate) * up
    // the orthonormal Walsh-Hadamard transform of every `size` elements (a power of two, at least 16), in place
    void (*hadamard)(float * x, int64_t n, int64_t size);
    // n floats -> a type of head_cache, of which n is a multiple of the block
    void (*store)(const float * x, int64_t n, ggml_type type, uint8_t * out);
    void (*attend)(const attention_shard & shard);
    // y = sum over shards of w_s out_s / sum over shards of w_s sum_s, w_s = exp(largest_s - largest); shard s lies
    // at out + s * stride, its largest and sum at [s * n_head]
    void (*combine)(const float * out, const float * largest, const float * sum, int n_shards, int64_t stride,
                    int64_t n_head, int64_t n_embd_head, float * y);
    void (*attend_tile)(const attention_tile & tile);
    // thin[t · stride + r], r up to the padded rank: scale · (row r of a) · x[t], of floats where the pair is wide
    void (*reduce)(const low_rank & pair, const input_rows & x, int64_t n_tokens, float * thin, int64_t stride);
    // y[t · stride + r] += row r of b · thin[t], for groups [g0, g1) as in matmul
    void (*expand)(const low_rank & pair, int64_t g0, int64_t g1, const float * thin, int64_t thin_stride,
                   int64_t n_tokens, float * y, int64_t stride);
    // kernels.h's matmul of packed floats, with tokens that are n_cols floats each
    void (*matmul)(const matrix & m, int64_t g0, int64_t g1, const float * x, int64_t n_tokens, float * y,
                   int64_t stride, const void * next);
};

}  // namespace mobilellm
