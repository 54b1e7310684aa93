// Loads each file given, as an argument or else as a line of the input, tokenizes, and decodes a few tokens in two
// sequences with embeddings, and one by one in one sequence: what `make sanitize` and `make fuzz` run under
// AddressSanitizer and UndefinedBehaviorSanitizer. Prints a JSON line [file, outcome] for each.

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "api.h"

namespace {

std::string quoted(const std::string & text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
        }
        out += c == '\n' || c < 0 ? ' ' : c;
    }
    return out + "\"";
}

std::string reason() {
    return mobilellm_guard_reason();
}

bool decode(llama_context * ctx, const std::vector<llama_token> & tokens, int first_position, int n_sequences) {
    llama_batch batch = llama_batch_init(n_sequences * int(tokens.size()), 0, 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
        for (int sequence = 0; sequence < n_sequences; ++sequence) {
            const int n        = batch.n_tokens++;
            batch.token[n]     = tokens[i];
            batch.pos[n]       = first_position + int(i);
            batch.n_seq_id[n]  = 1;
            batch.seq_id[n][0] = sequence;
            batch.logits[n]    = true;
        }
    }
    const bool done = mobilellm_decode(ctx, batch) == 0;
    llama_batch_free(batch);
    return done;
}

std::string use(const char * path) {
    gguf_context * file = mobilellm_gguf_open(path);
    if (!file) {
        return reason();
    }
    gguf_free(file);
    mobilellm_guard_begin(true);
    llama_model_params model_params = llama_model_default_params();
    llama_model *      model        = llama_model_load_from_file(path, model_params);
    llama_context *    ctx          = nullptr;
    if (model) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx                = 64;
        params.n_batch              = 32;
        params.n_seq_max            = 2;
        params.n_threads            = 2;
        params.n_threads_batch      = 2;
        params.embeddings           = true;
        ctx                         = llama_init_from_model(model, params);
    }
    mobilellm_guard_end();

    std::string outcome = "runs";
    if (!ctx) {
        outcome = reason();
    } else {
        const llama_vocab *      vocab = llama_model_get_vocab(model);
        const std::string        text  = "hello \xF0\x9F\x98\x80 <s>";
        std::vector<llama_token> tokens(text.size() + 2);
        const int                n =
            mobilellm_tokenize(vocab, text.data(), int(text.size()), tokens.data(), int(tokens.size()), true, true);
        if (n <= 0) {
            outcome = "not tokenized: " + reason();
        } else {
            tokens.resize(n);
            if (!decode(ctx, tokens, 0, 2) || !decode(ctx, { tokens[0] }, n, 2)) {
                outcome = "not decoded: " + reason();
            }
            llama_set_embeddings(ctx, false);
            llama_memory_clear(llama_get_memory(ctx), true);
            for (int i = 0; i < 3; ++i) {  // one token at a time is a graph of its own
                if (!decode(ctx, { tokens[0] }, i, 1)) {
                    outcome = "not decoded: " + reason();
                }
            }
        }
    }
    llama_free(ctx);
    llama_model_free(model);
    return outcome;
}

void report(const std::string & path) {
    const std::string outcome = use(path.c_str());
    std::printf("[%s, %s]\n", quoted(path).c_str(), quoted(outcome).c_str());
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char ** argv) {
    llama_backend_init();
    for (int i = 1; i < argc; ++i) {
        report(argv[i]);
    }
    for (std::string path; argc == 1 && std::getline(std::cin, path);) {
        report(path);
    }
    llama_backend_free();
    return 0;
}
