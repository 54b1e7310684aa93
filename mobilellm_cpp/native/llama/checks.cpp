// What a GGUF file must hold before llama.cpp may look at it. Upstream asserts on bad metadata, and some
// of it only fails inside a worker thread, where nothing can be caught: all of that is checked here first.

#include "gguf.h"
#include "llama-model-loader.h"
#include "mobilellm.h"

#include <algorithm>
#include <cmath>
#include <regex>
#include <set>
#include <string_view>
#include <unordered_map>

namespace {

constexpr int64_t max_width   = 1 << 20;  // of any row; larger is a corrupt number, not a model
constexpr int64_t max_context = 1 << 28;

[[noreturn]] void refuse(const std::string & sentence) {
    throw std::runtime_error(sentence);
}

// One file's metadata, read with types checked. Keys are given without the architecture's prefix.
struct metadata {
    const gguf_context * ctx;
    std::string          arch;

    int64_t find(const std::string & key) const { return gguf_find_key(ctx, (arch + "." + key).c_str()); }

    std::string name(const std::string & key) const { return arch + "." + key; }

    // the numbers of an integer key, scalar or array; empty when the key is absent
    std::vector<int64_t> integers(const std::string & key) const {
        const int64_t id = find(key);
        if (id < 0) {
            return {};
        }
        const bool      array = gguf_get_kv_type(ctx, id) == GGUF_TYPE_ARRAY;
        const gguf_type type  = array ? gguf_get_arr_type(ctx, id) : gguf_get_kv_type(ctx, id);
        const size_t    n     = array ? gguf_get_arr_n(ctx, id) : 1;
        if (type != GGUF_TYPE_UINT32 && type != GGUF_TYPE_INT32) {
            refuse(name(key) + " is not a 32-bit integer");
        }
        const void * data = array ? gguf_get_arr_data(ctx, id) : gguf_get_val_data(ctx, id);

        std::vector<int64_t> values(n);
        for (size_t i = 0; i < n; ++i) {
            values[i] = type == GGUF_TYPE_UINT32 ? int64_t(static_cast<const uint32_t *>(data)[i])
                                                 : int64_t(static_cast<const int32_t *>(data)[i]);
        }
        return values;
    }

    // every number of a key lies in [low, high]; returns the first, or `absent` when there is none
    int64_t bounded(const std::string & key, int64_t low, int64_t high, int64_t absent) const {
        const std::vector<int64_t> values = integers(key);
        for (const int64_t value : values) {
            if (value < low || value > high) {
                refuse(name(key) + " is " + std::to_string(value) + ", outside " + std::to_string(low) + " to " +
                       std::to_string(high));
            }
        }
        return values.empty() ? absent : values[0];
    }

    int64_t required(const std::string & key, int64_t low, int64_t high) const {
        if (integers(key).empty()) {
            refuse(name(key) + " is missing");
        }
        return bounded(key, low, high, 0);
    }

    // a float key is finite and above low, or absent
    void positive(const std::string & key, bool zero_allowed) const {
        const int64_t id = find(key);
        if (id < 0) {
            return;
        }
        if (gguf_get_kv_type(ctx, id) != GGUF_TYPE_FLOAT32) {
            refuse(name(key) + " is not a 32-bit float");
        }
        const float value = gguf_get_val_f32(ctx, id);
        if (!std::isfinite(value) || value < 0.0f || (value == 0.0f && !zero_allowed)) {
            refuse(name(key) + " is " + std::to_string(value) + ", which is not a usable number");
        }
    }
};

// A key that we do not know may change what the model computes: a later version wrote it.
void check_keys(const metadata & meta) {
    const std::string prefix = meta.arch + ".";
    for (int64_t id = 0; id < gguf_get_n_kv(meta.ctx); ++id) {
        const std::string_view key = gguf_get_key(meta.ctx, id);
        if (key.substr(0, prefix.size()) != prefix) {
            continue;
        }
        const mobilellm_key * known = mobilellm_find_key(key.substr(prefix.size()));
        if (!known || !known->ours) {
            refuse(std::string(key) + " is not a key that this version understands");
        }
    }
}

void check_schedule(const metadata & meta, int64_t n_stored) {
    const int64_t id = meta.find("block_schedule");
    if (id < 0) {
        return;
    }
    const std::string key = meta.name("block_schedule");
    if (gguf_get_kv_type(meta.ctx, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta.ctx, id) != GGUF_TYPE_UINT32) {
        refuse(key + " is not an array of 32-bit unsigned integers");
    }
    const std::vector<int64_t> schedule = meta.integers("block_schedule");
    if (schedule.empty()) {
        refuse(key + " is empty");
    }
    if (schedule.size() > LLAMA_MAX_LAYERS) {
        refuse(key + " makes " + std::to_string(schedule.size()) + " layers; llama.cpp holds at most " +
               std::to_string(LLAMA_MAX_LAYERS));
    }
    std::vector<bool> used(n_stored, false);
    for (const int64_t block : schedule) {
        if (block >= n_stored) {
            refuse(key + " names block " + std::to_string(block) + ", but only " + std::to_string(n_stored) +
                   " blocks are stored");
        }
        used[block] = true;
    }
    for (int64_t block = 0; block < n_stored; ++block) {
        if (!used[block]) {
            refuse(key + " never runs block " + std::to_string(block));
        }
    }
}

// What R1 and Pro say of their layers: an array has one entry for each stored block.
void check_layers(const metadata & meta, int64_t n_stored) {
    const auto check_array = [&](const char * key, gguf_type type, const char * items) {
        const int64_t id = meta.find(key);
        if (id < 0) {
            return false;
        }
        if (gguf_get_kv_type(meta.ctx, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta.ctx, id) != type ||
            int64_t(gguf_get_arr_n(meta.ctx, id)) != n_stored) {
            refuse(meta.name(key) + " is not an array of " + std::to_string(n_stored) + " " + items +
                   ", one for each stored block");
        }
        return true;
    };
    const int64_t norm = meta.find("attention.qk_norm");
    if (norm >= 0 && gguf_get_kv_type(meta.ctx, norm) != GGUF_TYPE_BOOL) {
        refuse(meta.name("attention.qk_norm") + " is neither true nor false");
    }
    if (check_array("attention.rope_pattern", GGUF_TYPE_UINT32, "32-bit unsigned integers")) {
        meta.bounded("attention.rope_pattern", 0, 1, 1);
    }
    const bool pattern = check_array("attention.sliding_window_pattern", GGUF_TYPE_BOOL, "booleans");
    const bool window  = meta.find("attention.sliding_window") >= 0;
    if (window && gguf_get_kv_type(meta.ctx, meta.find("attention.sliding_window")) == GGUF_TYPE_ARRAY) {
        refuse(meta.name("attention.sliding_window") + " is an array; all sliding layers have one window");
    }
    meta.bounded("attention.sliding_window", 1, max_context, 1);
    if (pattern != window) {
        refuse(meta.name("attention.sliding_window") + " and " + meta.name("attention.sliding_window_pattern") +
               " are not both there");
    }
    if (pattern) {
        const int64_t id     = meta.find("attention.sliding_window_pattern");
        const auto *  slides = static_cast<const bool *>(gguf_get_arr_data(meta.ctx, id));
        if (std::find(slides, slides + n_stored, true) == slides + n_stored) {
            refuse(meta.name("attention.sliding_window_pattern") + " names no layer with a window");
        }
    }
}

void check_heads(const metadata & meta, int64_t n_embd) {
    const std::vector<int64_t> heads = meta.integers("attention.head_count");
    std::vector<int64_t>       kv    = meta.integers("attention.head_count_kv");
    const int64_t              n     = meta.required("attention.head_count", 1, max_width);
    meta.bounded("attention.head_count_kv", 1, max_width, 0);
    if (kv.empty()) {
        kv = heads;
    }
    for (size_t i = 0; i < std::max(heads.size(), kv.size()); ++i) {
        const int64_t h = heads[std::min(i, heads.size() - 1)];
        const int64_t k = kv[std::min(i, kv.size() - 1)];
        if (h % k != 0) {
            refuse(meta.name("attention.head_count") + " is " + std::to_string(h) + ", not a multiple of " +
                   std::to_string(k) + " KV heads");
        }
    }
    if (meta.find("attention.key_length") < 0 && n_embd % n != 0) {
        refuse(meta.name("embedding_length") + " is " + std::to_string(n_embd) + ", not a multiple of " +
               std::to_string(n) + " heads");
    }
    const int64_t k_len = meta.bounded("attention.key_length", 1, max_width, n_embd / n);
    const int64_t v_len = meta.bounded("attention.value_length", 1, max_width, n_embd / n);
    const int64_t n_rot = meta.bounded("rope.dimension_count", 1, max_width, k_len);
    meta.bounded("attention.key_length_swa", k_len, k_len, k_len);
    meta.bounded("attention.value_length_swa", v_len, v_len, v_len);
    meta.bounded("rope.dimension_count_swa", n_rot, n_rot, n_rot);
    if (k_len != v_len) {
        refuse(meta.name("attention.key_length") + " is " + std::to_string(k_len) + " but " +
               meta.name("attention.value_length") + " is " + std::to_string(v_len));
    }
    if (n_rot != k_len || n_rot % 2 != 0) {
        refuse(meta.name("rope.dimension_count") + " is " + std::to_string(n_rot) +
               ", not the even head size (the head size is " + std::to_string(k_len) + ")");
    }
}

void check_rope(const metadata & meta) {
    meta.positive("rope.freq_base", false);
    meta.positive("rope.scaling.factor", true);
    meta.positive("rope.scale_linear", true);

    const int64_t id = meta.find("rope.scaling.type");
    if (id < 0) {
        return;
    }
    if (gguf_get_kv_type(meta.ctx, id) != GGUF_TYPE_STRING) {
        refuse(meta.name("rope.scaling.type") + " is not a string");
    }
    const std::string type = gguf_get_val_str(meta.ctx, id);
    for (const char * known : { "none", "linear", "yarn", "longrope" }) {
        if (type == known) {
            return;
        }
    }
    refuse(meta.name("rope.scaling.type") + " '" + type + "' is unknown");
}

// SentencePiece's default ids are 0 to 2, and a token that stands twice aborts upstream.
void check_vocabulary(const gguf_context * ctx) {
    const int64_t id = gguf_find_key(ctx, "tokenizer.ggml.tokens");
    if (id < 0 || gguf_get_kv_type(ctx, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(ctx, id) != GGUF_TYPE_STRING) {
        return;  // upstream says so
    }
    const size_t n = gguf_get_arr_n(ctx, id);
    if (n < 3) {
        refuse("tokenizer.ggml.tokens holds " + std::to_string(n) + " tokens, too few for a vocabulary");
    }
    std::unordered_map<std::string_view, size_t> seen;
    seen.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        const std::string_view token = gguf_get_arr_str(ctx, id, i);
        if (token.empty()) {
            continue;
        }
        const auto [first, is_new] = seen.emplace(token, i);
        if (!is_new) {
            refuse("tokenizer.ggml.tokens holds the same token at " + std::to_string(first->second) + " and " +
                   std::to_string(i));
        }
    }
}

// An override is as much a part of the metadata as what the file says: written into it, it passes the same checks.
void apply_overrides(const llama_model_loader & ml) {
    gguf_context * ctx = ml.metadata;
    for (const auto & [name, value] : ml.kv_overrides) {
        const char *    key     = name.c_str();
        const int64_t   id      = gguf_find_key(ctx, key);
        const gguf_type type    = id < 0 ? GGUF_TYPE_COUNT : gguf_get_kv_type(ctx, id);
        const bool      missing = id < 0;
        if (name == GGUF_KEY_GENERAL_ALIGNMENT) {
            refuse(name + " cannot be overridden");
        }
        switch (value.tag) {
            case LLAMA_KV_OVERRIDE_TYPE_INT:
                if (type == GGUF_TYPE_INT32 && value.val_i64 >= INT32_MIN && value.val_i64 <= INT32_MAX) {
                    gguf_set_val_i32(ctx, key, int32_t(value.val_i64));
                    continue;
                }
                if (value.val_i64 < 0 || value.val_i64 > int64_t(UINT32_MAX)) {
                    refuse(name + " is overridden by " + std::to_string(value.val_i64) + ", which has no 32 bits");
                }
                if (missing || type == GGUF_TYPE_UINT32) {
                    gguf_set_val_u32(ctx, key, uint32_t(value.val_i64));
                    continue;
                }
                break;
            case LLAMA_KV_OVERRIDE_TYPE_FLOAT:
                if (missing || type == GGUF_TYPE_FLOAT32) {
                    gguf_set_val_f32(ctx, key, float(value.val_f64));
                    continue;
                }
                break;
            case LLAMA_KV_OVERRIDE_TYPE_BOOL:
                if (missing || type == GGUF_TYPE_BOOL) {
                    gguf_set_val_bool(ctx, key, value.val_bool);
                    continue;
                }
                break;
            case LLAMA_KV_OVERRIDE_TYPE_STR:
                if (missing || type == GGUF_TYPE_STRING) {
                    gguf_set_val_str(ctx, key, value.val_str);
                    continue;
                }
                break;
        }
        refuse(name + " is overridden by a value of another kind than the file's, which is " + gguf_type_name(type));
    }
}

// What upstream's graphs divide by, of any architecture. Recurrent ones say zero where they have no attention.
void check_divisors(const metadata & meta, llm_arch arch) {
    if (llm_arch_is_recurrent(arch) || llm_arch_is_hybrid(arch)) {
        return;
    }
    for (const char * key : { "embedding_length", "attention.head_count", "rope.dimension_count" }) {
        const int64_t id = meta.find(key);
        if (id >= 0 && gguf_get_kv_type(meta.ctx, id) != GGUF_TYPE_ARRAY) {
            meta.bounded(key, 1, max_width, 1);
        }
    }
    for (const char * key : { "attention.key_length", "attention.value_length", "feed_forward_length",
                              "attention.head_count_kv", "expert_group_count" }) {
        meta.bounded(key, 0, max_width, 0);
    }
}

// Vectors hold numbers, and some files of other programs have them in half precision.
bool is_vector_type(ggml_type type, bool ours) {
    return type == GGML_TYPE_F32 || (!ours && (type == GGML_TYPE_F16 || type == GGML_TYPE_BF16));
}

void check_tensors(const llama_model_loader & ml, const std::string & arch, bool ours) {
    // what load_arch_tensors asks for; upstream looks for further optional ones by executed layer
    static const std::regex known(
        "(token_embd|output_norm|output|blk\\.[0-9]+\\.(attn_norm|attn_q|attn_k|attn_v|attn_output|ffn_norm|"
        "ffn_gate|ffn_up|ffn_down))\\.weight");
    for (const auto & [name, weight] : ml.weights_map) {
        const ggml_tensor * t = weight.tensor;
        if (arch == "mobilellm" && !std::regex_match(name, known)) {
            refuse("tensor '" + name + "' does not belong to a mobilellm model");
        }
        for (int dim = 0; dim < GGML_MAX_DIMS; ++dim) {
            if (t->ne[dim] < 1) {
                refuse("tensor '" + name + "' has an empty dimension");
            }
        }
        if (!ours && ggml_n_dims(t) <= 2 && (name.find("tid2eid") < name.size() || name.find("d2t") < name.size())) {
            continue;  // tables of token and expert ids
        }
        const bool vector = ggml_n_dims(t) == 1;
        if (vector ? !is_vector_type(t->type, ours) : !mobilellm_is_weight_type(t->type)) {
            refuse("tensor '" + name + "' has type " + ggml_type_name(t->type) +
                   (vector ? "; a vector must be f32" : ", which is not a weight type"));
        }
    }
}

}  // namespace

const mobilellm_key * mobilellm_find_key(std::string_view name) {
    static constexpr mobilellm_key keys[] = {
#include "keys.inc"
    };
    const auto * found = std::find_if(std::begin(keys), std::end(keys), [&](const auto & k) { return k.name == name; });
    return found == std::end(keys) ? nullptr : found;
}

bool mobilellm_is_weight_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
            return true;
        case GGML_TYPE_Q8_1:
        case GGML_TYPE_Q8_K:
            return false;  // for activations only
        default:
            return ggml_is_quantized(type) && ggml_get_type_traits(type)->to_float != nullptr;
    }
}

void mobilellm_check_file(const llama_model_loader & ml, bool vocab_only) {
    apply_overrides(ml);
    const metadata                          meta{ ml.metadata, ml.get_arch_name() };
    static const std::set<std::string_view> written = { "mobilellm", "llama", "qwen3", "granite_swa" };
    const bool                              ours    = written.count(meta.arch) > 0;
    check_vocabulary(meta.ctx);
    if (vocab_only) {
        return;
    }
    if (!ours) {  // none that the converter writes
        check_divisors(meta, ml.get_arch());
        check_tensors(ml, meta.arch, ours);
        return;
    }
    if (meta.arch == "mobilellm") {
        check_keys(meta);
    }
    const int64_t n_stored = meta.required("block_count", 1, LLAMA_MAX_LAYERS);
    const int64_t n_embd   = meta.required("embedding_length", 1, max_width);
    meta.bounded("embedding_length_out", n_embd, n_embd, n_embd);
    meta.bounded("nextn_predict_layers", 0, 0, 0);
    meta.bounded("pooling_type", 0, 4, 0);
    if (const int64_t n_expert = meta.bounded("expert_count", 0, LLAMA_MAX_EXPERTS, 0)) {
        meta.required("expert_used_count", 1, n_expert);
    }
    meta.required("context_length", 1, max_context);
    meta.required("feed_forward_length", 1, max_width);
    meta.positive("attention.layer_norm_rms_epsilon", true);
    check_heads(meta, n_embd);
    check_rope(meta);
    check_tensors(ml, meta.arch, ours);
    if (meta.arch == "mobilellm") {
        check_schedule(meta, n_stored);
        check_layers(meta, n_stored);
        for (const char * key : { "attention.head_count", "attention.head_count_kv", "feed_forward_length" }) {
            const int64_t id = meta.find(key);
            if (id >= 0 && gguf_get_kv_type(meta.ctx, id) == GGUF_TYPE_ARRAY) {
                refuse(meta.name(key) + " is an array; blocks of a mobilellm model are alike");
            }
        }
    }
}
