// The step of fused.h: what its two ways of computing share.
//
// A few tokens (fused_rows.cpp): the threads share the rows of each matrix and meet five or six times a block. Many
// (fused_tokens.cpp): each thread takes some tokens at a time through a block and they meet once.

#pragma once

#include "arena.h"
#include "barrier.h"
#include "dispatch.h"
#include "fused.h"
#include "thread_limit.h"

#include <atomic>
#include <cstdint>
#include <vector>

namespace mobilellm {

constexpr int     max_threads   = 64;  // the rest stays idle
constexpr int64_t max_few       = 64;  // tokens whose rows are shared,
constexpr int64_t few_a_seq     = 12;  // and of each sequence on average. Not of threads: the bits differ
constexpr int64_t max_embd_head = 256;
constexpr int64_t shard_cells   = 32;    // at least, where there is more than one shard
constexpr int64_t slice_floats  = 8192;  // of the feed-forward's hidden vectors, computed at a time

struct range {
    int64_t begin;
    int64_t end;

    int64_t size() const { return end - begin; }
};

// What thread ith of nth does of n items.
inline range share(int64_t n, int64_t ith, int64_t nth) {
    return { n * ith / nth, n * (ith + 1) / nth };
}

// Where a group of a matrix begins.
inline const uint8_t * at(const matrix & w, int64_t group) {
    return w.data + group * group_size(w.type, w.n_cols);
}

// The activations of token t in rows of n_cols.
inline activations * row_of(activations * rows, int64_t t, int64_t n_cols) {
    return reinterpret_cast<activations *>(reinterpret_cast<uint8_t *>(rows) + t * activation_size(n_cols));
}

// A matrix of the model and what adapters add to it.
struct projection : matrix {
    std::vector<low_rank> pairs;
};

struct layer {
    const float * attn_norm;
    const float * ffn_norm;
    projection    qkv[3];
    projection    wo;
    projection    gate;
    projection    up;
    projection    down;
    head_cache    k;  // of KV head 0 and the first of the request's streams
    head_cache    v;
    const float * control;
    bool          rope;
    bool          qk_norm;
    int           cache;
    const layer * later;  // in whose turn the weights change, when those of this layer come from the cache
};

// What a request says of one cache. A cell is one of the token's stream.
struct request_cache {
    bool            sees(int64_t token, int64_t cell) const;
    int64_t         cell(int64_t token) const { return cells[token] % size; }  // where its K and V go
    head_cache      stream(const head_cache & all, int64_t token) const;
    const int32_t * positions(int64_t token) const { return held + token / n_each * n_kv; }  // (n_kv)

    // Puts cells in the order of their positions, in which attention adds them up: where they lie in the cache is an
    // accident of who else uses it. `seen`, if any, has a value for each of the n cells, which goes with it.
    void sort(int64_t token, int32_t * cells, int64_t n, uint64_t * seen = nullptr) const;

    int64_t             n_kv;
    int64_t             size;    // cells of a stream
    int64_t             n_each;  // tokens of each stream
    const int64_t *     cells;   // (n_tokens) where K and V go, counted through all streams of the cache
    const ggml_tensor * mask;
    const int32_t *     held;  // (n_streams, n_kv) the positions of cells
};

// The sources of the node and where its result goes.
struct fused_request {
    fused_request(ggml_tensor * dst, const fused_model & model);

    const float *   embd;       // (n_tokens, n_embd)
    const int32_t * positions;  // (n_tokens)
    const int32_t * outputs;    // (n_outputs) tokens, ascending
    const int32_t * sequences;  // (n_tokens)
    float *         out;        // (n_outputs, n_vocab or n_embd)
    request_cache   caches[max_caches];
};

// Which cells of a cache the tokens see, in the order of their positions.
struct seen_cells {
    int32_t *  cells;    // (few tokens or pieces, n_kv)
    int64_t *  n_cells;  // (few tokens or pieces)
    uint64_t * seen;     // (pieces, n_kv) which tokens of the piece see the cell
};

// Tokens that a thread takes through a block at a time. Those that belong to one sequence are a piece of it.
struct chunk {
    range tokens;
    range pieces;
};

// What a thread keeps to itself; the arrays of one of the two ways are there. n is the most tokens it computes with at
// a time: all of few, or a chunk.
struct private_arrays {
    float *    vector;  // (the longest row of any matrix), or a slice of the feed-forward
    float *    gate;    // a slice of the feed-forward
    float *    up;      // likewise
    input_rows input;   // (n, the longest row) of the next matrix
    float *    thin;    // (2, n, thin_size_) what rows of adapters make of the input, twice for gate and up
    // few tokens
    float *    x;       // (n, n_embd) the residual stream
    float *    rope;    // (n, n_embd_head)
    float *    q;       // (n_head, n_embd_head)
    float *    scores;  // (n_head / n_head_kv, max_scores)
    float *    cells;   // (2, max_scores, n_embd_head)
    // many
    float *    rows;    // (n, n_head, n_embd_head) attention, (n, n_embd) what is added to the stream
    input_rows hidden;  // (n, n_ff) of down
    float *    tile;    // attention_tile_work
};

// Of the calling thread, which plans its steps and is the first thread of each.
thread_limit & own_thread_limit();

class fused_step {
  public:
    static bool knows(const fused_model & m);
    explicit fused_step(const fused_model & model);

    void run(ggml_tensor * dst, int ith, int nth);
    int  n_threads();  // the most for the next run

  private:
    void share_rows(const fused_request & r, int ith, int nth);
    void share_tokens(const fused_request & r, int ith, int nth);

    // of both
    void rope_angles(int32_t position, float * rope) const;
    void normalize(const private_arrays & own, const float * x, int64_t n_tokens, const float * weight) const;
    void give(const input_rows & rows, int64_t n_cols, int64_t token, int64_t column, const float * x, int64_t n) const;
    projection with_pairs(const ggml_tensor * weight);
    void       reduce(const projection & w, const input_rows & input, int64_t n_tokens, float * thin) const;
    void matmul(const matrix & w, range groups, const input_rows & input, int64_t n_tokens, float * y, int64_t stride,
                const void * next, const uint8_t * later) const;
    void multiply(const projection & w, range groups, const input_rows & input, int64_t n_tokens, const float * thin,
                  float * y, int64_t stride, const void * next, const uint8_t * later) const;
    void project_qkv(const layer & l, const layer * later, const private_arrays & own, int64_t n_tokens,
                     const float * rope, float * qkv, int ith, int nth) const;
    void control(const layer & l, float * x, int64_t n_tokens) const;
    void ready_for_scores(const layer & l, float * heads, int64_t n) const;
    void write_cell(const layer & l, const request_cache & cache, const private_arrays & own, const float * qkv,
                    int64_t head, int64_t token) const;
    void finish(const float * x, float * vector, const input_rows & input, int64_t token, float * out) const;
    void project_output(const input_rows & input, float * out, int ith, int nth) const;
    void give_heads(float * heads, const input_rows & rows, int64_t token) const;
    void feed_forward(const layer & l, const layer * later, const private_arrays & own, int64_t n_tokens, range blocks,
                      const input_rows & hidden, const uint8_t * next) const;

    // of share_rows
    void attend(const layer & l, const fused_request & r, const private_arrays & own, int ith, int nth);
    int  n_shards(const layer & l, int64_t token) const;

    // of share_tokens
    void divide(const fused_request & r, int nth);
    void prepare(const fused_request & r, const chunk & part);
    void list_cells(const request_cache & cache, const seen_cells & list, int64_t piece) const;
    void begin_layer(const layer & l, const fused_request & r, const private_arrays & own, range tokens);
    void finish_layer(const layer & l, const fused_request & r, const private_arrays & own, const chunk & part,
                      const int32_t * tokens, int64_t n);
    void attend_piece(const layer & l, const request_cache & cache, const private_arrays & own, int64_t piece,
                      range tokens, float * out);

    const fused_model  model_;
    const kernels &    kernels_ = best().products;
    const fused_ops &  ops_     = best().ops;
    std::vector<layer> layers_;
    matrix             output_{};       // without data where the states are the result
    int64_t            thin_size_ = 0;  // the padded ranks of all pairs of a matrix, the most of any
    int64_t            n_group_;
    int64_t            q_size_;
    int64_t            qkv_size_;
    bool               few_;
    int64_t            block_size_;  // bytes of the matrices of the first block
    int64_t            n_lists_;     // few tokens or the most pieces

    arena          arena_;
    barrier        barrier_;
    private_arrays private_[max_threads];

    // shared
    float *              qkv_;  // (n_tokens, n_head + 2 n_head_kv, n_embd_head)
    seen_cells           lists_[max_caches];
    // few tokens
    float *              out_;      // (n_tokens, max_shards, n_head, n_embd_head) attention by shard
    float *              largest_;  // (n_tokens, max_shards, n_head)
    float *              sum_;      // (n_tokens, max_shards, n_head)
    float *              update_;   // (n_tokens, n_embd) what attention or feed-forward adds to the residual stream
    input_rows           hidden_;   // (n_tokens, n_ff) of down
    // many
    std::vector<chunk>   chunks_;
    std::vector<range>   pieces_;          // their tokens
    std::vector<int32_t> all_;             // the numbers of all tokens
    float *              x_;               // (n_tokens, n_embd) the residual stream
    float *              rope_;            // (n_tokens, n_embd_head)
    input_rows           last_;            // (n_outputs, n_embd) of the output matrix
    std::vector<std::atomic<int>> taken_;  // chunks that a thread has taken up, between two barriers
};

}  // namespace mobilellm
