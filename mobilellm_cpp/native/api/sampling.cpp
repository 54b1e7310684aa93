// The next token from the logits of a step: those that could pass the samplers, and a refusal of what are no numbers.

#include "guard.h"

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

}  // namespace

int32_t mobilellm_sample(llama_sampler * sampler, llama_context * ctx, int32_t idx, int32_t n_best) {
    return under_guard(INT32_MIN, [&] {
        const float * logits  = llama_get_logits_ith(ctx, idx);
        const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
        if (logits && !all_finite(logits, n_vocab)) {
            return -1;
        }
        if (!logits || n_best <= 0 || n_best >= n_vocab) {
            return llama_sampler_sample(sampler, ctx, idx);
        }
        static thread_local std::vector<llama_token_data> candidates;
        best_candidates(logits, n_vocab, n_best, candidates);
        llama_token_data_array array = { candidates.data(), candidates.size(), /*selected*/ -1, /*sorted*/ false };
        llama_sampler_apply(sampler, &array);
        if (array.selected < 0 || size_t(array.selected) >= array.size) {
            throw std::runtime_error("the samplers select nothing");
        }
        const llama_token token = array.data[array.selected].id;
        llama_sampler_accept(sampler, token);
        return token;
    });
}
