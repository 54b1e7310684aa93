// mobilellm-run: a model's continuation of a text, without Python, for machines of little memory. The same text, seed
// and options as with `mobilellm generate` give the same continuation.

#include "api.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int32_t FEW   = 12;   // tokens of a step that are computed one by one (docs/architecture.md)
constexpr int32_t PIECE = 128;  // tokens of a prompt in a step

const char * const HELP =
    "Usage: mobilellm-run MODEL.gguf [options]\n"
    "\n"
    "Continues a text, from -p or stdin. Only the continuation goes to stdout.\n"
    "\n"
    "  -p, --prompt TEXT       the text to continue\n"
    "  -n, --tokens N          the most tokens to make (128)\n"
    "  --ctx N                 context in tokens (512)\n"
    "  -t, --threads N         threads (as many as there are cores)\n"
    "  --cache-type TYPE       f16 or q8_0: the KV cache (q8_0 where blocks run twice, else f16)\n"
    "  --temperature NUMBER    0 always takes the likeliest token (0.8)\n"
    "  --top-k N, --top-p NUMBER, --min-p NUMBER   which tokens are considered (40, 0.95, 0.05)\n"
    "  --seed N                the same seed gives the same text\n"
    "  --mlock                 keep the model in memory: the system may not swap it out\n";

struct wrong_usage : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct options {
    std::string model, prompt;
    bool        from_stdin  = true;
    int32_t     n_tokens    = 128;
    int32_t     n_ctx       = 512;
    int32_t     n_threads   = std::max(1, int(std::thread::hardware_concurrency()));
    ggml_type   cache_type  = GGML_TYPE_COUNT;  // not given
    float       temperature = 0.8f, top_p = 0.95f, min_p = 0.05f;
    int32_t     top_k = 40;
    uint32_t    seed  = uint32_t(std::time(nullptr));
    bool        lock  = false;
};

double number(const std::string & name, const std::string & text, double least, double most) {
    char *       end   = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end || !(value >= least && value <= most)) {
        throw wrong_usage(name + " is '" + text + "', not a number from " + std::to_string(int64_t(least)) + " to " +
                          std::to_string(int64_t(most)));
    }
    return value;
}

options parse(const std::vector<std::string> & words) {
    constexpr double MOST = 2147483647;

    options o;
    for (size_t i = 0; i < words.size(); ++i) {
        const std::string & word  = words[i];
        const auto          value = [&] {
            if (i + 1 == words.size()) {
                throw wrong_usage(word + " needs a value");
            }
            return words[++i];
        };
        const auto in = [&](double least, double most) { return number(word, value(), least, most); };
        if (word == "-p" || word == "--prompt") {
            o.prompt     = value();
            o.from_stdin = false;
        } else if (word == "-n" || word == "--tokens") {
            o.n_tokens = int32_t(in(1, MOST));
        } else if (word == "--ctx") {
            o.n_ctx = int32_t(in(1, 1 << 28));
        } else if (word == "-t" || word == "--threads") {
            o.n_threads = int32_t(in(1, 512));
        } else if (word == "--cache-type") {
            const std::string type = value();
            if (type != "f16" && type != "q8_0") {
                throw wrong_usage("--cache-type is '" + type + "', not f16 or q8_0");
            }
            o.cache_type = type == "f16" ? GGML_TYPE_F16 : GGML_TYPE_Q8_0;
        } else if (word == "--temperature") {
            o.temperature = float(in(0, 1e6));
        } else if (word == "--top-k") {
            o.top_k = int32_t(in(0, MOST));
        } else if (word == "--top-p") {
            o.top_p = float(in(0, 1));
        } else if (word == "--min-p") {
            o.min_p = float(in(0, 1));
        } else if (word == "--seed") {
            o.seed = uint32_t(in(0, 4294967295.0));
        } else if (word == "--mlock") {
            o.lock = true;
        } else if (word[0] == '-' || !o.model.empty()) {
            throw wrong_usage("what is '" + word + "'?");
        } else {
            o.model = word;
        }
    }
    if (o.model.empty()) {
        throw wrong_usage("which model?");
    }
    return o;
}

// What upstream says in its own words, or says of a later moment.
void check_file(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error(path + ": " + std::strerror(errno));
    }
    char magic[4] = {};
    if (!file.read(magic, sizeof magic) || std::memcmp(magic, "GGUF", sizeof magic) != 0) {
        throw std::runtime_error(path + " is not a GGUF file");
    }
}

std::string text_of(const options & o) {
    if (!o.from_stdin) {
        return o.prompt;
    }
    std::string text{ std::istreambuf_iterator<char>(std::cin), {} };
    for (const char end : { '\n', '\r' }) {  // the line end at the end of a file is the file's
        if (!text.empty() && text.back() == end) {
            text.pop_back();
        }
    }
    return text;
}

struct freeing {
    void operator()(llama_model * p) const { llama_model_free(p); }
    void operator()(llama_context * p) const { llama_free(p); }
    void operator()(llama_sampler * p) const { llama_sampler_free(p); }
};

// The first line of what went wrong under guard, without upstream's function names.
std::string reason() {
    std::string text = mobilellm_guard_reason();
    text             = text.substr(0, text.find('\n'));
    for (size_t end; (end = text.find(": ")) != text.npos;) {
        const std::string head  = text.substr(0, end);
        const bool        where = head.find(' ') == head.npos || head.find("error loading model") == 0 ||
                           head == "failed to initialize the context";
        if (!where) {
            break;
        }
        text = text.substr(end + 2);
    }
    return text;
}

// What work makes under guard; raises the reason where that is nothing.
template <typename T, typename Work>
std::unique_ptr<T, freeing> made(const std::string & what, Work work) {
    mobilellm_guard_begin(true);
    T *               result = work();
    const std::string why    = reason();
    mobilellm_guard_end();
    if (!result) {
        throw std::runtime_error(what + ": " + why);
    }
    return std::unique_ptr<T, freeing>(result);
}

std::vector<llama_token> tokens_of(const llama_vocab * vocab, const std::string & text) {
    std::vector<llama_token> tokens(text.size() + 2);
    int32_t                  n =
        mobilellm_tokenize(vocab, text.data(), int32_t(text.size()), tokens.data(), int32_t(tokens.size()), true, true);
    if (n < 0) {
        throw std::runtime_error("the vocabulary of this file cannot spell the text");
    }
    tokens.resize(n);
    return tokens;
}

// As engine/sampling.py has them.
std::unique_ptr<llama_sampler, freeing> samplers(const options & o) {
    llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    const auto      add   = [&](llama_sampler * sampler) { llama_sampler_chain_add(chain, sampler); };
    if (o.temperature < 1e-4f) {
        add(llama_sampler_init_greedy());
    } else {
        add(llama_sampler_init_top_k(o.top_k));
        add(llama_sampler_init_top_p(o.top_p, 1));
        add(llama_sampler_init_min_p(o.min_p, 1));
        add(llama_sampler_init_temp(o.temperature));
        add(llama_sampler_init_dist(o.seed == LLAMA_DEFAULT_SEED ? 0x9E3779B9 : o.seed));
    }
    return std::unique_ptr<llama_sampler, freeing>(chain);
}

// The token that follows tokens, of which `done` are in the cache.
llama_token next_token(llama_context * ctx, const std::vector<llama_token> & tokens, int32_t & done,
                       llama_sampler * chain, int32_t n_best) {
    const int32_t             end = int32_t(tokens.size());
    llama_token               chosen[1];
    std::vector<llama_pos>    positions(PIECE);
    std::vector<llama_seq_id> sequences(PIECE, 0);
    std::vector<int8_t>       outputs(PIECE, 0);
    std::vector<float *>      nowhere(PIECE, nullptr);
    while (done < end) {
        int32_t n = std::min(end - done, PIECE);
        if (end - done - n > 0 && end - done - n <= FEW) {
            n -= FEW;  // so that all of a prompt is computed in one way
        }
        for (int32_t i = 0; i < n; ++i) {
            positions[i] = done + i;
            outputs[i]   = done + i == end - 1;
        }
        mobilellm_step step{ n,
                             tokens.data() + done,
                             positions.data(),
                             sequences.data(),
                             outputs.data(),
                             &chain,
                             &n_best,
                             chosen,
                             nowhere.data(),
                             nullptr,
                             false };
        mobilellm_guard_begin(true);
        const int32_t     result = mobilellm_run_step(ctx, &step);
        const std::string why    = reason();
        mobilellm_guard_end();
        if (result != 0) {
            throw std::runtime_error("the model cannot be run: " +
                                     (why.empty() ? "error " + std::to_string(result) : why));
        }
        done += n;
    }
    if (chosen[0] < 0) {
        throw std::runtime_error("the model is damaged: its results are not numbers");
    }
    return chosen[0];
}

// As engine/gguf_file.py has it: blocks that run twice have twice the cache.
ggml_type default_cache(const llama_model * model) {
    char       text[32] = "";
    const bool ours     = llama_model_meta_val_str(model, "mobilellm.block_count", text, sizeof text) > 0;
    const bool shared   = ours && llama_model_n_layer(model) > std::atoi(text);
    return shared && llama_model_n_embd(model) / llama_model_n_head(model) % 32 == 0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
}

void write_text(const std::string & text) {
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
        throw std::runtime_error(std::string("the text cannot be written: ") + std::strerror(errno));
    }
}

void write_piece(const llama_vocab * vocab, llama_token token) {
    std::string piece(256, '\0');
    int32_t     n = llama_token_to_piece(vocab, token, piece.data(), int32_t(piece.size()), 0, false);
    if (n < 0) {
        piece.resize(-n);
        n = llama_token_to_piece(vocab, token, piece.data(), -n, 0, false);
    }
    piece.resize(size_t(std::max(n, 0)));
    write_text(piece);
}

void run(const options & o) {
    check_file(o.model);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    if (ggml_backend_dev_count() == 0) {
        ggml_backend_load_all();  // that lie beside this program
    }
    llama_model_params model_params = llama_model_default_params();
    model_params.load_mode          = o.lock ? LLAMA_LOAD_MODE_MMAP_MLOCK : LLAMA_LOAD_MODE_MMAP;

    const auto model =
        made<llama_model>(o.model, [&] { return llama_model_load_from_file(o.model.c_str(), model_params); });
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = uint32_t(o.n_ctx);
    params.n_batch = params.n_ubatch = uint32_t(std::min(PIECE, o.n_ctx));
    params.n_threads = params.n_threads_batch = o.n_threads;
    params.flash_attn_type                    = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = params.type_v = o.cache_type == GGML_TYPE_COUNT ? default_cache(model.get()) : o.cache_type;
    params.swa_full               = false;
    params.kv_unified             = true;

    const auto context = made<llama_context>(o.model, [&] { return llama_init_from_model(model.get(), params); });
    const llama_vocab *      vocab  = llama_model_get_vocab(model.get());
    std::vector<llama_token> tokens = tokens_of(vocab, text_of(o));
    if (tokens.empty()) {
        throw std::runtime_error("the text is empty");
    }
    if (int64_t(tokens.size()) >= o.n_ctx) {
        throw std::runtime_error("the text has " + std::to_string(tokens.size()) + " tokens, but the context holds " +
                                 std::to_string(o.n_ctx) + ": give a larger --ctx");
    }
    const auto    chain  = samplers(o);
    const int32_t n_best = o.temperature < 1e-4f ? 1 : o.top_k <= 128 ? o.top_k : 0;
    int32_t       done   = 0;
    for (int32_t made = 0; made < o.n_tokens && int64_t(tokens.size()) < o.n_ctx; ++made) {
        const llama_token token = next_token(context.get(), tokens, done, chain.get(), n_best);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        write_piece(vocab, token);
        tokens.push_back(token);
    }
    write_text("\n");
}

}  // namespace

int main(int argc, char ** argv) {
    const std::vector<std::string> words(argv + 1, argv + argc);
    const auto given = [&](const char * word) { return std::find(words.begin(), words.end(), word) != words.end(); };
    if (given("-h") || given("--help")) {
        std::fputs(HELP, stdout);
        return 0;
    }
    try {
        run(parse(words));
        return 0;
    } catch (const wrong_usage & error) {
        std::fprintf(stderr, "mobilellm-run: %s\n\n%s", error.what(), HELP);
        return 2;
    } catch (const std::exception & error) {
        std::fprintf(stderr, "mobilellm-run: %s\n", error.what());
        return 1;
    }
}
