// Several threads use one model at once, each in contexts of its own that compute on several threads: what it says must
// be the same for all, and ThreadSanitizer (`make sanitize`) must find nothing.
//
//     callers_test MODEL

#include "api.h"

#include <cstdio>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int N_CALLERS = 3;
constexpr int N_ROUNDS  = 2;

using logits = std::vector<float>;

// Decodes tokens [first, first + n) of one sequence; the logits after each. Empty where that fails.
logits decode(llama_context * ctx, int n_vocab, int first, int n) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    for (int i = 0; i < n; ++i) {
        batch.token[i]     = 3 + (first + i) * 7 % (n_vocab - 3);
        batch.pos[i]       = first + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = true;
    }
    batch.n_tokens = n;
    logits result;
    if (mobilellm_decode(ctx, batch) == 0) {
        const float * all = llama_get_logits(ctx);
        result.assign(all, all + size_t(n) * n_vocab);
    }
    llama_batch_free(batch);
    return result;
}

// What the model says in a new context: one that runs all blocks as one node, or one with upstream's own graph.
std::vector<logits> answers(llama_model * model, int n_threads, bool ordinary) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.n_batch              = 128;
    params.n_threads            = n_threads;
    params.n_threads_batch      = n_threads;
    if (ordinary) {  // a callback sees each node
        params.cb_eval = [](ggml_tensor *, bool, void *) { return false; };
    }
    mobilellm_guard_begin(true);  // nothing is logged
    llama_context * ctx = llama_init_from_model(model, params);

    const int           n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<logits> result;
    int                 n_past = 0;
    for (const int n : { 100, 5, 1, 1, 1 }) {  // both ways of the node, and again
        result.push_back(ctx ? decode(ctx, n_vocab, n_past, n) : logits());
        n_past += n;
    }
    llama_free(ctx);
    mobilellm_guard_end();
    return result;
}

}  // namespace

int main(int argc, char ** argv) {
    llama_backend_init();
    mobilellm_guard_begin(true);
    llama_model * model = argc > 1 ? llama_model_load_from_file(argv[1], llama_model_default_params()) : nullptr;
    mobilellm_guard_end();
    if (!model) {
        std::printf("no model: %s\n", mobilellm_guard_reason());
        return 1;
    }
    int n_failed = 0;
    for (const bool ordinary : { false, true }) {
        const std::vector<logits> expected = answers(model, 1, ordinary);

        std::vector<std::vector<logits>> found(N_CALLERS * N_ROUNDS);
        std::vector<std::thread>         callers;
        for (int caller = 0; caller < N_CALLERS; ++caller) {
            callers.emplace_back([&, caller] {
                for (int round = 0; round < N_ROUNDS; ++round) {
                    found[caller * N_ROUNDS + round] = answers(model, 1 + (caller + round) % 3, ordinary);
                }
            });
        }
        for (std::thread & caller : callers) {
            caller.join();
        }
        for (const auto & one : found) {
            n_failed += one != expected || one.front().empty() || one.back().empty();
        }
    }
    std::printf("%d of %d answers differ\n", n_failed, 2 * N_CALLERS * N_ROUNDS);
    llama_model_free(model);
    llama_backend_free();
    return n_failed ? 1 : 0;
}
