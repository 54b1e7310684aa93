// While a thread is under guard, an abort of ggml becomes a C++ exception, which upstream's loaders catch and
// log; what is logged as an error is kept as the reason.

#include "guard.h"

#include "ggml.h"
#include "grammar_limits.h"
#include "thread_pool.h"

#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

thread_local bool        quiet = true;
thread_local std::string reason;  // error lines logged under guard, oldest first

std::mutex log_mutex;
#ifndef _WIN32
const int fork_safe = pthread_atfork([] { log_mutex.lock(); }, [] { log_mutex.unlock(); }, [] { log_mutex.unlock(); });
#endif
ggml_log_callback outer_log      = nullptr;
void *            outer_log_data = nullptr;

void throw_abort(const char * message) {
    if (*mobilellm_guard_depth() > 0) {
        throw std::runtime_error(message);
    }
    std::fprintf(stderr, "%s\n", message);  // as ggml does without a callback; the caller aborts
}

void keep_errors(ggml_log_level level, const char * text, void *) {
    const int depth = *mobilellm_guard_depth();
    if (depth > 0 && level == GGML_LOG_LEVEL_ERROR) {
        reason += text;
    }
    if (outer_log && (depth == 0 || !quiet)) {
        outer_log(level, text, outer_log_data);
    }
}

// The parser compares every name in a file with all before it.
void check_counts(const char * path) {
    constexpr int64_t most_keys = 4096, most_tensors = 32768;

    unsigned char head[24];
    std::FILE *   file = std::fopen(path, "rb");
    const size_t  n    = file ? std::fread(head, 1, sizeof head, file) : 0;
    if (file) {
        std::fclose(file);
    }
    if (n < sizeof head) {
        return;  // the parser says so
    }
    int64_t n_tensors, n_keys;
    std::memcpy(&n_tensors, head + 8, sizeof n_tensors);
    std::memcpy(&n_keys, head + 16, sizeof n_keys);
    if (std::memcmp(head, "GGUF", 4) == 0 && (n_keys > most_keys || n_tensors > most_tensors)) {
        throw std::runtime_error("it says that it holds " + std::to_string(n_keys) + " keys and " +
                                 std::to_string(n_tensors) + " tensors, more than " + std::to_string(most_keys) +
                                 " and " + std::to_string(most_tensors));
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
    if ((*mobilellm_guard_depth())++ == 0) {
        quiet = silence;
        reason.clear();
        mobilellm_limit_grammars(true);
    }
}

void mobilellm_guard_end() {
    if (--*mobilellm_guard_depth() == 0) {
        mobilellm_limit_grammars(false);
    }
}

const char * mobilellm_guard_reason() {
    return reason.c_str();
}

void mobilellm_set_reason(const std::string & text) {
    reason = text;
}

int32_t mobilellm_decode(llama_context * ctx, llama_batch batch) {
    return under_guard(INT32_MIN, [&] { return llama_decode(ctx, batch); });
}

llama_model * mobilellm_load_ahead(const char * path) {
    return under_guard<llama_model *>(nullptr, [&] {
        llama_backend_init();
        llama_model_params params = llama_model_default_params();
        params.n_gpu_layers       = 0;
        params.load_mode          = LLAMA_LOAD_MODE_MMAP;
        params.progress_callback  = [](float, void *) { return true; };  // the default one logs
        return llama_model_load_from_file(path, params);
    });
}

gguf_context * mobilellm_gguf_open(const char * path) {
    return under_guard<gguf_context *>(nullptr, [&] {
        check_counts(path);
        return gguf_init_from_file(path, { /*no_alloc*/ true, /*ctx*/ nullptr });
    });
}
