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

#define MOBILELLM_NOT_ASKED (-2)

// Tokens of several sequences, those of each one after the other, and what is wanted of them. Where something is wanted
// of neighbours of a sequence, the later ones are a draft: the samplers are asked after each for as long as they chose
// the next one.
struct mobilellm_step {
    int32_t              n_tokens;
    const llama_token *  tokens;     // (n_tokens)
    const llama_pos *    positions;  // (n_tokens)
    const llama_seq_id * sequences;  // (n_tokens)
    const int8_t *       outputs;    // (n_tokens) 1: something is wanted after this token. For each such, in order:
    llama_sampler **     samplers;   // who chooses the next token, or NULL
    const int32_t *      n_best;     // up to 128: the samplers begin with a top-k of that many (or, for 1, are greedy),
                                     // so that only they matter; 0: any token does
    llama_token *        chosen;     // the token: -1 where a logit is no number, INT32_MIN where a sampler fails,
                                     // MOBILELLM_NOT_ASKED behind a token of a draft that was not chosen
    float **             logits;     // where the logits are copied to (n_vocab), or NULL
    float **             states;     // where the normed hidden states are copied to (n_embd), or NULL; NULL: nowhere.
                                     // Else they must be wanted of every token, and nothing else.
    bool                 fused;      // set: it was computed in one node, whose bits do not depend on other sequences
};

// 0 when done. Else nothing of it is in the cache: 1 there is no room; 2 a sequence does not end where its tokens
// begin; INT32_MIN and others, with a reason, what cannot be computed.
LLAMA_API int32_t mobilellm_run_step(llama_context * ctx, mobilellm_step * step);

// llama_sampler_sample over logits (n_vocab) without NaN, some of which may be -inf, as `chosen` above.
LLAMA_API int32_t mobilellm_choose(llama_sampler * sampler, const float * logits, int32_t n_vocab, int32_t n_best);

// llama_sampler_init_grammar of a grammar that can be followed in bounded memory; NULL, with a reason, for others.
LLAMA_API llama_sampler * mobilellm_grammar_init(const llama_vocab * vocab, const char * text, const char * root);

// llama_state_set_data, or llama_state_seq_set_data for a sequence that is not negative. False, with a reason, for what
// is no state of such a context; what it was to fill is as it was then, or empty.
LLAMA_API bool mobilellm_state_set(llama_context * ctx, const uint8_t * data, size_t size, llama_seq_id sequence);

// llama_model_load_from_file with the parameters of a llama_cpp.Llama that was given none; NULL for what cannot be
// loaded.
LLAMA_API llama_model * mobilellm_load_ahead(const char * path);

// gguf_init_from_file without the tensors' data; NULL, with a reason, for what its parser does not take.
LLAMA_API gguf_context * mobilellm_gguf_open(const char * path);

// Which kernels of ours this processor runs; "" where they are turned off; NULL, with a reason, for a setting that is
// not known.
LLAMA_API const char * mobilellm_kernels_text();

// Whether a matrix of this name is packed where it holds floats.
LLAMA_API bool mobilellm_packs_floats(const char * name);

// How packed weights are brought to the caches before they are read: what measurements during loads have chosen, with
// their speeds; "" where there was nothing to choose. Lives until the calling thread asks again.
LLAMA_API const char * mobilellm_streaming_text();

// For models loaded from now on, instead of a measurement: a hint of kernels.h (0 none, 1 nta, 2 t2, 3 t1, 4 t0; below
// 0: measure again) and how far ahead, in 64 columns. Only the speed depends on it.
LLAMA_API void mobilellm_streaming_force(int32_t hint, int64_t ahead);

// Bytes a second at which n_threads read `size` bytes of their own in huge pages: the best of every prefetch
// instruction and none, near and far, and one to eight streams a thread; 0 when there is no memory for it.
LLAMA_API double mobilellm_read_bandwidth(size_t size, int32_t n_threads);

// The part of a decoded token's time that passes between the final norm and the logits, the median of n_steps in a
// context of its own; 0 when it cannot be told.
LLAMA_API double mobilellm_head_share(llama_model * model, llama_context_params params, llama_token token,
                                      int32_t n_steps);

}  // extern "C"
