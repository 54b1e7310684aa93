// The `mobilellm` architecture for llama.cpp: a Llama whose stored blocks run in the order of a
// schedule (MobileLLM, arXiv 2402.14905, section 3.4: block-wise weight sharing), and what R1 and Pro
// add to it: a weightless norm of q and k, layers without RoPE, layers with a sliding window.
//
// The patches in upstream/ call what is declared here; nothing else of upstream changes.

#pragma once

#include "models/models.h"

#include <cstdio>
#include <string_view>

struct llama_model_mobilellm : public llama_model_base {
    explicit llama_model_mobilellm(const llama_model_params & params) : llama_model_base(params) {}

    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;

    // (n_layer) the stored block that each executed layer uses, in order
    std::vector<uint32_t> schedule;

    struct graph : public llm_graph_context {
        graph(const llama_model_mobilellm & model, const llm_graph_params & params);

        // attention and feed-forward of executed layer il, each with its residual; inp: (n_embd, n_tokens).
        // kv is the cache of all layers alike or, with sliding windows, the pair of caches (KV: its class)
        template <typename KV>
        ggml_tensor * attention(const llama_layer & block, ggml_tensor * inp, ggml_tensor * positions, KV * kv, int il);
        ggml_tensor * feed_forward(const llama_layer & block, ggml_tensor * inp, int il);
    };
};

// Throws std::runtime_error with one sentence when a file says something that the loader, the graph or a worker thread
// would abort, divide or loop on: for the architectures that the converter writes all of that, for others what none may
// have. Writes the caller's overrides into the metadata, so that they are checked alike.
void mobilellm_check_file(const llama_model_loader & ml, bool vocab_only);

// A metadata key, without the architecture's name: whether a `mobilellm` file may hold it, and whether the fused step
// computes what it says. convert/keys.py has the table.
struct mobilellm_key {
    std::string_view name;
    bool             ours;
    bool             fused;
};

// nullptr for a key that nobody listed.
const mobilellm_key * mobilellm_find_key(std::string_view name);

// Types that the CPU backend can multiply by and look up rows in.
bool mobilellm_is_weight_type(ggml_type type);

// Throws std::runtime_error with one sentence when a LoRA adapter does not fit the model, or cannot be multiplied by.
void mobilellm_check_adapter(const llama_model & model, const gguf_context * adapter, FILE * file);

// Upper bound of graph nodes. Upstream counts stored tensors, too few once blocks run more than once.
uint32_t mobilellm_graph_max_nodes(const llama_model & model);

// The graph that runs all blocks in one node where model and request allow it, else the architecture's own.
std::unique_ptr<llm_graph_context> mobilellm_graph(const llama_model & model, const llm_graph_params & params);

// Whether caches of the model hold V as rows although flash attention is off: the fused step reads nothing else, and
// columns would take it twice as long.
bool mobilellm_values_as_rows(const llama_model & model);

// Whether the calling thread's next steps are for their hidden states alone. The fused step then leaves out the output
// matrix, and the context's logits stay what they were.
void mobilellm_want_states_alone(bool alone);

// How many steps the calling thread has computed in one node.
int64_t mobilellm_fused_runs();

// The scheduler's callback of `mobilellm bench`: stops a step once, at the node "result_norm".
bool mobilellm_at_final_norm(ggml_tensor * tensor, bool ask, void * data);
