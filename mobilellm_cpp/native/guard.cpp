// While a thread is under guard, an abort of ggml becomes a C++ exception, which upstream's loaders catch and
// log; what is logged as an error is kept as the reason. Long words are split on a stack that they fit on.

#include "guard.h"

#include "ggml.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

thread_local int         depth = 0;
thread_local bool        quiet = true;
thread_local std::string reason;  // error lines logged under guard, oldest first

std::mutex        log_mutex;
ggml_log_callback outer_log      = nullptr;
void *            outer_log_data = nullptr;

void throw_abort(const char * message) {
    if (depth > 0) {
        throw std::runtime_error(message);
    }
    std::fprintf(stderr, "%s\n", message);  // as ggml does without a callback; the caller aborts
}

void keep_errors(ggml_log_level level, const char * text, void *) {
    if (depth > 0 && level == GGML_LOG_LEVEL_ERROR) {
        reason += text;
    }
    if (outer_log && (depth == 0 || !quiet)) {
        outer_log(level, text, outer_log_data);
    }
}

// What work returns; failed, with a reason, when it throws.
template <typename Result, typename Work>
Result under_guard(Result failed, Work work) {
    mobilellm_guard_begin(true);
    Result result = failed;
    try {
        result = work();
    } catch (const std::exception & error) {
        reason = error.what();
    }
    mobilellm_guard_end();
    return result;
}

// What llama.cpp splits texts into words with, std::regex, recurses once for each character of a match (llama.cpp
// issue 27783): 26,000 letters without a space are more than 8 MiB of stack. About 700 bytes each were measured.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t stack_per_character = 16384;
#else
constexpr size_t stack_per_character = 2048;
#endif
constexpr size_t short_word = 256;      // characters that fit on any stack
constexpr size_t long_word  = 1 << 20;  // more are refused

// A bound on the characters that one match can take: none goes on beyond the end of a line, but for the white space
// and slashes that may follow it.
size_t longest_word(std::string_view text) {
    size_t longest = 0;
    size_t current = 0;
    bool   newline = false;
    for (const unsigned char c : text) {
        if ((c & 0xC0) == 0x80) {
            continue;  // not the first byte of a character
        }
        const bool maybe_space = c <= ' ' || c == 0xC2 || (c >= 0xE1 && c <= 0xE3);
        if (c == '\n' || c == '\r') {
            newline = true;
        } else if (newline && !maybe_space && c != '/') {
            newline = false;
            current = 0;
        }
        longest = std::max(longest, ++current);
    }
    return longest;
}

// Calls work, on a thread with stack enough for words of so many characters.
template <typename Work>
int32_t on_stack_for(size_t characters, Work work) {
#ifndef _WIN32
    if (characters > short_word) {
        struct job {
            Work &      work;
            int32_t     result;
            std::string error;
        } job{ work, 0, "" };

        const auto run = [](void * data) -> void * {
            auto & job = *static_cast<struct job *>(data);
            mobilellm_guard_begin(true);
            try {
                job.result = job.work();
            } catch (const std::exception & error) {
                job.error = error.what();
            }
            mobilellm_guard_end();
            return nullptr;
        };
        pthread_attr_t settings;
        pthread_attr_init(&settings);
        pthread_attr_setstacksize(&settings, (1 << 20) + characters * stack_per_character);
        pthread_t  thread;
        const bool started = characters <= long_word && pthread_create(&thread, &settings, run, &job) == 0;
        pthread_attr_destroy(&settings);
        if (!started) {
            throw std::runtime_error("a line of " + std::to_string(characters) + " characters is too long");
        }
        pthread_join(thread, nullptr);
        if (!job.error.empty()) {
            throw std::runtime_error(job.error);
        }
        return job.result;
    }
#endif
    return work();
}

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

void mobilellm_guard_begin(bool silence) {
    const std::lock_guard<std::mutex> lock(log_mutex);
    ggml_set_abort_callback(throw_abort);

    ggml_log_callback current = nullptr;
    void *            data    = nullptr;
    llama_log_get(&current, &data);
    if (current != keep_errors) {
        outer_log      = current;
        outer_log_data = data;
        llama_log_set(keep_errors, nullptr);
    }
    if (depth++ == 0) {
        quiet = silence;
        reason.clear();
    }
}

void mobilellm_guard_end() {
    --depth;
}

const char * mobilellm_guard_reason() {
    return reason.c_str();
}

int32_t mobilellm_tokenize(const llama_vocab * vocab, const char * text, int32_t length, llama_token * tokens,
                           int32_t capacity, bool add_special, bool parse_special) {
    const auto work = [&] { return llama_tokenize(vocab, text, length, tokens, capacity, add_special, parse_special); };
    const bool splits = llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_BPE;
    return under_guard(INT32_MIN,
                       [&] { return on_stack_for(splits ? longest_word({ text, size_t(length) }) : 0, work); });
}

int32_t mobilellm_decode(llama_context * ctx, llama_batch batch) {
    return under_guard(INT32_MIN, [&] { return llama_decode(ctx, batch); });
}

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

gguf_context * mobilellm_gguf_open(const char * path) {
    return under_guard<gguf_context *>(
        nullptr, [&] { return gguf_init_from_file(path, { /*no_alloc*/ true, /*ctx*/ nullptr }); });
}
