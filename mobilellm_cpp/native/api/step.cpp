// A step of several sequences, and the next token of each from its logits: only those that could pass the samplers are
// looked at, and what are no numbers is refused.

#include "guard.h"
#include "mobilellm.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

namespace {

// Infinities and NaN have all bits of the exponent set. No branch in the loop, so that it vectorizes.
bool all_finite(const float * values, int32_t n) {
    constexpr uint32_t exponent = 0x7f800000u;
    uint32_t           found    = 0;
    for (int32_t i = 0; i < n; i++) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        found |= (bits & exponent) == exponent;
    }
    return found == 0;
}

// Those tokens, in order, that std::partial_sort looks at twice when it finds the n_best largest of all logits: the
// first n_best, and each that is larger than the least of the n_best so far. It finds the same among these alone, ties
// included, and there are some hundreds of them in a vocabulary of 200,000.
void best_candidates(const float * logits, int32_t n_vocab, int32_t n_best, std::vector<llama_token_data> & out) {
    constexpr int32_t  block = 64;
    std::vector<float> best(logits, logits + n_best);  // a heap whose front is the least
    std::make_heap(best.begin(), best.end(), std::greater<float>());
    out.clear();
    for (int32_t i = 0; i < n_best; i++) {
        out.push_back({ i, logits[i], 0.0f });
    }
    for (int32_t start = n_best; start < n_vocab; start += block) {
        const int32_t end   = std::min(start + block, n_vocab);
        const float   least = best.front();
        int32_t       above = 0;
        for (int32_t i = start; i < end; i++) {
            above |= logits[i] > least;
        }
        for (int32_t i = start; above && i < end; i++) {
            if (logits[i] > best.front()) {
                std::pop_heap(best.begin(), best.end(), std::greater<float>());
                best.back() = logits[i];
                std::push_heap(best.begin(), best.end(), std::greater<float>());
                out.push_back({ i, logits[i], 0.0f });
            }
        }
    }
}

// The token that the samplers take; throws where one fails.
llama_token choose(llama_sampler * sampler, const float * logits, int32_t n_vocab, int32_t n_best) {
    static thread_local std::vector<llama_token_data> candidates;
    if (n_best > 0 && n_best < n_vocab) {
        best_candidates(logits, n_vocab, n_best, candidates);
    } else {
        candidates.resize(n_vocab);
        for (int32_t i = 0; i < n_vocab; i++) {
            candidates[i] = { i, logits[i], 0.0f };
        }
    }
    llama_token_data_array array = { candidates.data(), candidates.size(), /*selected*/ -1, /*sorted*/ false };
    llama_sampler_apply(sampler, &array);
    if (array.selected < 0 || size_t(array.selected) >= array.size) {
        throw std::runtime_error("the samplers select nothing");
    }
    const llama_token token = array.data[array.selected].id;
    llama_sampler_accept(sampler, token);
    return token;
}

// -1 where a logit is no number; INT32_MIN, with a reason, where a sampler fails.
llama_token chosen(llama_sampler * sampler, const float * logits, int32_t n_vocab, int32_t n_best) {
    try {
        return !all_finite(logits, n_vocab) ? -1 : choose(sampler, logits, n_vocab, n_best);
    } catch (const std::exception & error) {
        mobilellm_set_reason(error.what());
        return INT32_MIN;
    }
}

// Where the tokens of one sequence begin in a step.
struct run {
    llama_seq_id sequence;
    llama_pos    first;
};

std::vector<run> runs_of(const mobilellm_step & step) {
    std::vector<run> runs;
    for (int32_t i = 0; i < step.n_tokens; i++) {
        if (i == 0 || step.sequences[i] != step.sequences[i - 1]) {
            runs.push_back({ step.sequences[i], step.positions[i] });
        }
    }
    return runs;
}

int32_t decode(llama_context * ctx, const mobilellm_step & step) {
    std::vector<int32_t>        n_seq_id(step.n_tokens, 1);
    std::vector<llama_seq_id *> seq_id(step.n_tokens);
    for (int32_t i = 0; i < step.n_tokens; i++) {
        seq_id[i] = const_cast<llama_seq_id *>(step.sequences + i);
    }
    llama_batch batch{};
    batch.n_tokens = step.n_tokens;
    batch.token    = const_cast<llama_token *>(step.tokens);
    batch.pos      = const_cast<llama_pos *>(step.positions);
    batch.n_seq_id = n_seq_id.data();
    batch.seq_id   = seq_id.data();
    batch.logits   = const_cast<int8_t *>(step.outputs);
    return mobilellm_decode(ctx, batch);
}

}  // namespace

int32_t mobilellm_run_step(llama_context * ctx, mobilellm_step * step) {
    return under_guard(INT32_MIN, [&]() -> int32_t {
        const llama_memory_t   memory = llama_get_memory(ctx);
        const std::vector<run> runs   = runs_of(*step);
        for (const run & r : runs) {
            if (llama_memory_seq_pos_max(memory, r.sequence) != r.first - 1) {
                return 2;
            }
        }
        const bool    states = step->states != nullptr;
        const int64_t before = mobilellm_fused_runs();
        if (states) {
            llama_set_embeddings(ctx, true);
            mobilellm_want_states_alone(true);
        }
        const int32_t result = decode(ctx, *step);
        if (states) {
            mobilellm_want_states_alone(false);
            llama_set_embeddings(ctx, false);
        }
        step->fused = mobilellm_fused_runs() > before;
        if (result != 0) {
            for (const run & r : runs) {  // of what was begun
                llama_memory_seq_rm(memory, r.sequence, r.first, -1);
            }
            return result;
        }
        const llama_model * model   = llama_get_model(ctx);
        const int32_t       n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
        const int32_t       n_embd  = llama_model_n_embd(model);
        for (int32_t i = 0, at = 0; i < step->n_tokens; i++) {
            if (!step->outputs[i]) {
                continue;
            }
            if (states && step->states[at]) {
                std::memcpy(step->states[at], llama_get_embeddings_ith(ctx, i), n_embd * sizeof(float));
            }
            const float * logits = step->samplers[at] || step->logits[at] ? llama_get_logits_ith(ctx, i) : nullptr;
            if (step->logits[at]) {
                std::memcpy(step->logits[at], logits, n_vocab * sizeof(float));
            }
            const bool drafted = i > 0 && step->outputs[i - 1] && step->sequences[i] == step->sequences[i - 1];
            if (step->samplers[at] && drafted && step->chosen[at - 1] != step->tokens[i]) {
                step->chosen[at] = MOBILELLM_NOT_ASKED;  // the samplers have seen nothing of it
            } else if (step->samplers[at]) {
                step->chosen[at] = chosen(step->samplers[at], logits, n_vocab, step->n_best[at]);
            }
            at++;
        }
        return 0;
    });
}

int32_t mobilellm_choose(llama_sampler * sampler, const float * logits, int32_t n_vocab, int32_t n_best) {
    return under_guard(INT32_MIN, [&] { return choose(sampler, logits, n_vocab, n_best); });
}
