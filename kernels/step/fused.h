// A Llama-like model as one graph node: from the tokens' embeddings to their logits, or to the normed hidden states
// that the output matrix is multiplied with. All threads run it and meet at barriers of their own.
//
// The thread count never changes a bit of the result: a row of a matrix is summed by one thread, attention in the
// order of positions. Nor do other tokens of the batch, or where in the cache a sequence lies and what else does, as
// long as it is computed in the same of the two ways of fused_step.h.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

namespace mobilellm {

// One executed layer. Layers that share their weights name the same tensors.
struct fused_layer {
    const ggml_tensor * attn_norm;
    const ggml_tensor * wq;
    const ggml_tensor * wk;
    const ggml_tensor * wv;
    const ggml_tensor * wo;
    const ggml_tensor * ffn_norm;
    const ggml_tensor * ffn_gate;
    const ggml_tensor * ffn_up;
    const ggml_tensor * ffn_down;
    // llama.cpp's views of its KV cache, (n_embd_head, n_head_kv, n_kv, n), where n streams have as many cells each
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * control;  // (n_embd) of a control vector, which is added to the layer's result, or nullptr

    bool rope;
    bool qk_norm;  // of each head of q and k, without weights, after RoPE
    int  cache;    // which of the model's caches k and v are of
};

constexpr int max_caches = 2;  // one of all layers alike, or one of full and one of sliding layers

struct fused_cache {
    int64_t n_kv;  // cells the mask speaks of
    int64_t size;  // cells of a stream of the cache
};

// What an adapter adds to a matrix wherever it is multiplied by.
struct fused_pair {
    const ggml_tensor * weight;
    const void *        packed;  // by pack_pair
    int64_t             rank;
    float               scale;
};

struct fused_model {
    std::vector<fused_layer> layers;
    std::vector<fused_pair>  pairs;
    const ggml_tensor *      output_norm;
    const ggml_tensor *      output;  // nullptr: the normed states are the result, not the logits

    int64_t n_tokens;
    int64_t n_seqs;     // that they belong to
    int64_t n_streams;  // of the cache that they use: as many tokens of each, one stream after the other
    int64_t n_outputs;
    int64_t n_embd;
    int64_t n_ff;
    int64_t n_head;
    int64_t n_head_kv;
    int64_t n_embd_head;  // also the number of rotated dimensions

    std::vector<fused_cache> caches;  // max_caches at most

    float               eps;
    float               kq_scale;
    float               rope_freq_base;
    float               rope_freq_scale;
    float               rope_attn_factor;
    float               rope_ext_factor;    // of YaRN, 0: none
    float               rope_corr_dims[2];  // likewise: between these pairs it goes from one scale to the other
    const ggml_tensor * rope_factors;       // (n_embd_head / 2) that frequencies are divided by, or nullptr

    // Size of the Hadamard matrix that the cache's K (and q) and V are rotated by, 0: not rotated.
    int64_t k_rotation;
    int64_t v_rotation;
};

class fused_step;

// What ggml_backend_reg_get_proc_address gives libllama for "mobilellm_fused".
struct fused_interface {
    // nullptr for a model that this cannot run: weights that are not packed, types or sizes it does not know, or no
    // memory for so many tokens
    fused_step * (*create)(const fused_model & model);
    void (*destroy)(fused_step * step);

    // Before each run: `node` gets as many threads as it can use.
    void (*plan)(fused_step * step, ggml_tensor * node);

    // A ggml_custom_op_t; user data is the step, and dst (n_vocab or n_embd, at least n_outputs) has the sources
    // 0: embeddings (n_embd, n_tokens), F32; 1: positions (n_tokens), I32; 2: tokens (n_outputs) that are wanted,
    // ascending, I32; 3: the sequence of each token (n_tokens) and then, for each cache, the positions that its cells
    // hold (n_kv, n_streams), I32; and for each cache, from 4 on: cells to write (n_tokens), counted through all its
    // streams, I64; mask (n_kv, n_tokens), F32 or F16, 0 or -inf
    void (*run)(ggml_tensor * dst, int ith, int nth, void * step);

    // A LoRA pair in the form that the step reads (low_rank.h): its bytes, and packing it. wide: its matrix is of
    // floats.
    size_t (*pair_size)(const ggml_tensor * a, const ggml_tensor * b, bool wide);
    void (*pack_pair)(const ggml_tensor * a, const ggml_tensor * b, bool wide, void * packed);

    // How many steps the calling thread has run as the first thread of a node.
    int64_t (*n_runs)();

    // Whether the weight is packed.
    bool (*packed)(const ggml_tensor * weight);
};

}  // namespace mobilellm

// What ggml's CPU backend asks for every function by name before ggml does; nullptr where it is not ours or turned off.
void * mobilellm_proc_address(const char * name);
