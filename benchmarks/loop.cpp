// The bare loop of llama.h, without sampling, over whichever libllama it is linked with.
//
//     loop MODEL THREADS first N [MADE]               prints a line as soon as the token after N prompt tokens is
//                                                     there, another after MADE tokens, how many it decoded on stderr
//     loop MODEL THREADS load                         prints the seconds until the model is loaded, and from the same
//                                                     start until one token is decoded
//     loop MODEL THREADS batch N STEPS [UNIFIED]      prints the tokens/s of N sequences of 16 tokens that go on in one
//                                                     batch a step, greedily, in one cache (1) or in one each (0)
//     loop MODEL THREADS embed N LENGTH UNIFIED       prints the texts/s of N texts of so many tokens in one batch,
//     their
//                                                     states pooled by the mean, in one cache or in one each
//     loop MODEL THREADS time FLASH KV N [DEPTH=N]…   prints tokens/s: prefill of N (0: left out), then for each
//                                                     depth, in rising order, N decoded tokens
//
// FLASH is 0 or 1, KV the type of the KV cache: f16 or q8_0. Rates are those of the median step, and of the median
// of three prefills: what interrupts a program on a shared machine is not the program's.

#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const char * what) {
    std::fprintf(stderr, "loop: %s\n", what);
    std::exit(1);
}

using clock_type = std::chrono::steady_clock;

double seconds_since(clock_type::time_point start) {
    return std::chrono::duration<double>(clock_type::now() - start).count();
}

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

struct session {
    llama_model *          model;
    llama_context *        context;
    llama_memory_t         memory;
    clock_type::time_point began;
    double                 load_seconds;
    int                    n_past = 0;

    session(const char * path, int n_threads, bool flash, ggml_type kv, int n_seq = 1, bool unified = true,
            enum llama_pooling_type pooling = LLAMA_POOLING_TYPE_NONE) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        llama_backend_init();
        began = clock_type::now();
        model = llama_model_load_from_file(path, llama_model_default_params());
        if (!model) {
            fail("the model does not load");
        }
        load_seconds                = seconds_since(began);
        llama_context_params params = llama_context_default_params();
        params.n_ctx                = 2048;
        params.n_threads            = n_threads;
        params.n_threads_batch      = n_threads;
        params.flash_attn_type      = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        params.type_k               = kv;
        params.type_v               = kv;
        params.n_seq_max            = n_seq;
        params.kv_unified           = unified;
        params.embeddings           = pooling != LLAMA_POOLING_TYPE_NONE;
        params.pooling_type         = pooling;
        context                     = llama_init_from_model(model, params);
        if (!context) {
            fail("no context");
        }
        memory = llama_get_memory(context);
    }

    // Decodes n tokens in one batch; seconds.
    double run(int n) {
        std::vector<llama_token> tokens(n);
        const int                n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
        for (int i = 0; i < n; i++) {
            tokens[i] = (5 + n_past + i) % n_vocab;
        }
        const auto start = clock_type::now();
        if (n > 0 && llama_decode(context, llama_batch_get_one(tokens.data(), n)) != 0) {
            fail("llama_decode");
        }
        llama_synchronize(context);
        n_past += n;
        return seconds_since(start);
    }

    // The likeliest token by the logits of the i-th token of the last batch.
    llama_token best(int i) {
        const float * logits = llama_get_logits_ith(context, i);
        return std::max_element(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model))) - logits;
    }

    // Tokens/s of n sequences that go on together for so many steps.
    double batched(int n, int n_steps) {
        llama_batch batch = llama_batch_init(16 * n, 0, 1);
        const auto  add   = [&](llama_token token, int position, int sequence, bool wanted) {
            const int i        = batch.n_tokens++;
            batch.token[i]     = token;
            batch.pos[i]       = position;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = sequence;
            batch.logits[i]    = wanted;
        };
        for (int i = 0; i < 16 * n; i++) {
            add(5 + i, i % 16, i / 16, i % 16 == 15);
        }
        std::vector<llama_token> tokens(n);
        clock_type::time_point   start;
        for (int step = 0; step <= n_steps; step++) {
            if (llama_decode(context, batch) != 0) {
                fail("llama_decode");
            }
            for (int i = 0; i < n; i++) {
                tokens[i] = best(step == 0 ? 16 * i + 15 : i);
            }
            if (step == 0) {
                start = clock_type::now();
            }
            batch.n_tokens = 0;
            for (int i = 0; i < n; i++) {
                add(tokens[i], 16 + step, i, true);
            }
        }
        const double seconds = seconds_since(start);
        llama_batch_free(batch);
        return n * n_steps / seconds;
    }

    // Texts/s of n texts of `length` tokens, by the median of five runs.
    double embedded(int n, int length) {
        llama_batch batch = llama_batch_init(n * length, 0, 1);
        batch.n_tokens    = n * length;
        for (int i = 0; i < batch.n_tokens; i++) {
            batch.token[i]     = 5 + i;
            batch.pos[i]       = i % length;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = i / length;
            batch.logits[i]    = true;
        }
        std::vector<double> seconds;
        for (int i = 0; i < 6; i++) {
            clear();
            const auto start = clock_type::now();
            if (llama_decode(context, batch) != 0 || !llama_get_embeddings_seq(context, n - 1)) {
                fail("llama_decode");
            }
            seconds.push_back(seconds_since(start));
        }
        llama_batch_free(batch);
        return n / median({ seconds.begin() + 1, seconds.end() });
    }

    void clear() {
        llama_memory_clear(memory, true);
        n_past = 0;
    }
};

}  // namespace

int main(int argc, char ** argv) {
    const std::string mode = argc < 4 ? "" : argv[3];
    if (mode == "load") {
        session s(argv[1], std::atoi(argv[2]), true, GGML_TYPE_F16);
        s.run(1);
        std::printf("%.6g\n%.6g\n", s.load_seconds, seconds_since(s.began));
        return 0;
    }
    if (mode == "first" && argc > 4) {
        session s(argv[1], std::atoi(argv[2]), true, GGML_TYPE_F16);
        s.run(std::atoi(argv[4]));
        std::printf("%d\n", s.best(-1));
        std::fflush(stdout);
        if (argc > 5) {
            while (s.n_past < std::atoi(argv[4]) + std::atoi(argv[5]) - 1) {
                s.run(1);
            }
            std::printf("\n");
            std::fprintf(stderr, "%d tokens\n", s.n_past);
        }
        return 0;
    }
    if (mode == "batch" && argc > 5) {
        const int n = std::atoi(argv[4]);
        session   s(argv[1], std::atoi(argv[2]), true, GGML_TYPE_F16, n, argc < 7 || std::atoi(argv[6]) != 0);
        std::printf("%.6g\n", s.batched(n, std::atoi(argv[5])));
        return 0;
    }
    if (mode == "embed" && argc > 6) {
        const int n = std::atoi(argv[4]);
        session   s(argv[1], std::atoi(argv[2]), true, GGML_TYPE_F16, n, std::atoi(argv[6]) != 0,
                    LLAMA_POOLING_TYPE_MEAN);
        std::printf("%.6g\n", s.embedded(n, std::atoi(argv[5])));
        return 0;
    }
    if (mode != "time" || argc < 7) {
        fail("usage: see the head of loop.cpp");
    }
    const ggml_type kv = std::string(argv[5]) == "q8_0" ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
    session         s(argv[1], std::atoi(argv[2]), std::atoi(argv[4]) != 0, kv);
    const int       prefill = std::atoi(argv[6]);
    s.run(64);  // warm
    if (prefill > 0) {
        std::vector<double> seconds;
        for (int i = 0; i < 3; i++) {
            s.clear();
            seconds.push_back(s.run(prefill));
        }
        std::printf("%.6g\n", prefill / median(seconds));
    }
    s.clear();
    for (int i = 7; i < argc; i++) {
        const std::string pair  = argv[i];
        const int         depth = std::atoi(pair.c_str());
        const int         n     = std::atoi(pair.c_str() + pair.find('=') + 1);
        s.run(depth - 2 - s.n_past);
        s.run(1), s.run(1);  // the first steps build the graph
        std::vector<double> seconds;
        for (int step = 0; step < n; step++) {
            seconds.push_back(s.run(1));
        }
        std::printf("%.6g\n", 1 / median(seconds));
    }
    return 0;
}
