// Called by upstream/patches/ while llama.cpp loads a model: what makes loading fast and keeps it small.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <string>

struct llama_mmap;
struct llama_model_loader;

// gguf_kv_to_str for the log, which shows 40 characters: of a long array the first elements only. A vocabulary takes
// as long to write out as to load.
std::string mobilellm_kv_text(const gguf_context * file, int i);

// True for a token without '<' and '[', which is none of those that llama.cpp knows as special by their text.
inline bool mobilellm_plain_word(const std::string & token) {
    return token.find('<') == std::string::npos && token.find('[') == std::string::npos;
}

// What a loader keeps of ours.
struct mobilellm_loading {
    ggml_backend_buffer_ptr reserved;           // for the weights that will be packed
    bool                    on_demand = false;  // map() is to bring the file's pages, the loader not all at once

    // Before a tensor is copied out of a mapped file: gives the pages of earlier ones back to the system, and brings
    // this one's, with some that follow, by one call. So the file and the copy are never in memory both.
    void map(const llama_mmap & mapping, const void * data, size_t size);

    // Gives the last of them back. All may be read again, from the file.
    void release();

  private:
    const uint8_t * first = nullptr;  // what is mapped at the moment
    const uint8_t * end   = nullptr;
};

// Before the vocabulary is read: where most of a file's weights will be packed, allocates the buffer for them, so that
// its memory is made ready meanwhile, and has the system begin to read the file. Where the model is to stay in memory,
// it is this buffer that is locked, and params are changed, so that the file is not: both would be in memory.
void mobilellm_reserve_weights(llama_model_loader & loader, llama_model_params & params);

// Has the system zero a KV cache's pages when they are first used, where clearing would write to all of them at once;
// false where it cannot. Declared by the patch, too, in the function that calls it.
bool mobilellm_clear_later(ggml_backend_buffer_t cache);

// ggml_backend_alloc_ctx_tensors_from_buft, with the reserved buffer where it is what that would allocate.
ggml_backend_buffer_t mobilellm_alloc_weights(llama_model_loader & loader, ggml_context * ctx,
                                              ggml_backend_buffer_type_t type);
