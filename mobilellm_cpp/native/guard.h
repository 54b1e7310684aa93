// The C API that the Python side calls beside llama.h.

#pragma once

#include "gguf.h"
#include "llama.h"

extern "C" {

// Puts the calling thread under guard and forgets earlier reasons: an abort of ggml on this thread becomes a
// C++ exception, and errors are kept. With silence nothing is passed on to the log. Calls nest; the outermost
// one decides about silence.
LLAMA_API void mobilellm_guard_begin(bool silence);
LLAMA_API void mobilellm_guard_end();

// What was logged as an error on this thread since the outermost guard began; lives until the next guard.
LLAMA_API const char * mobilellm_guard_reason();

// llama_tokenize that cannot take the process down: INT32_MIN when the vocabulary fails, with a reason.
LLAMA_API int32_t mobilellm_tokenize(const llama_vocab * vocab, const char * text, int32_t length, llama_token * tokens,
                                     int32_t capacity, bool add_special, bool parse_special);

// llama_decode that turns what it cannot build a graph for into INT32_MIN, with a reason.
LLAMA_API int32_t mobilellm_decode(llama_context * ctx, llama_batch batch);

// gguf_init_from_file without the tensors' data; NULL, with a reason, for what its parser does not take.
LLAMA_API gguf_context * mobilellm_gguf_open(const char * path);

}  // extern "C"
