// While a thread is under guard, an abort of ggml becomes a C++ exception, which upstream's loaders catch and
// log; what is logged as an error is kept as the reason.

#include "guard.h"

#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

namespace {

thread_local int         depth = 0;
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
    if (outer_log && depth == 0) {
        outer_log(level, text, outer_log_data);
    }
}

int64_t context_length(const gguf_context * file) {
    const int64_t arch = gguf_find_key(file, "general.architecture");
    if (arch < 0 || gguf_get_kv_type(file, arch) != GGUF_TYPE_STRING) {
        return 0;
    }
    const int64_t key = gguf_find_key(file, (std::string(gguf_get_val_str(file, arch)) + ".context_length").c_str());
    return key < 0 || gguf_get_kv_type(file, key) != GGUF_TYPE_UINT32 ? 0 : int64_t(gguf_get_val_u32(file, key));
}

}  // namespace

void mobilellm_guard_begin() {
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
    mobilellm_guard_begin();
    int32_t n = INT32_MIN;
    try {
        n = llama_tokenize(vocab, text, length, tokens, capacity, add_special, parse_special);
    } catch (const std::exception & error) {
        reason = error.what();
    }
    mobilellm_guard_end();
    return n;
}

int64_t mobilellm_context_length(const char * path) {
    mobilellm_guard_begin();
    int64_t n_ctx = -1;
    try {
        const gguf_context_ptr file(gguf_init_from_file(path, { /*no_alloc*/ true, /*ctx*/ nullptr }));
        if (file) {
            n_ctx = context_length(file.get());
        }
    } catch (const std::exception & error) {
        reason = error.what();
    }
    mobilellm_guard_end();
    return n_ctx;
}
