// What a LoRA adapter must hold before llama.cpp may take it: upstream trusts its types and numbers, looks at no rank,
// and leaves out silently what it cannot apply.

#include "ggml.h"
#include "gguf.h"
#include "llama-arch.h"
#include "llama-model.h"
#include "mobilellm.h"

#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t max_tensor = int64_t(1) << 32;  // bytes of one half

[[noreturn]] void refuse(const std::string & sentence) {
    throw std::runtime_error("the adapter " + sentence);
}

std::string text(const gguf_context * file, const char * key) {
    const int64_t id = gguf_find_key(file, key);
    if (id < 0) {
        return "";
    }
    if (gguf_get_kv_type(file, id) != GGUF_TYPE_STRING) {
        refuse(std::string("has a ") + key + " that is not a text");
    }
    return gguf_get_val_str(file, id);
}

void check_metadata(const llama_model & model, const gguf_context * file) {
    if (text(file, "general.type") != "adapter" || text(file, "adapter.type") != "lora") {
        refuse("is another kind of GGUF file (general.type is '" + text(file, "general.type") + "', adapter.type '" +
               text(file, "adapter.type") + "')");
    }
    const std::string arch = text(file, "general.architecture");
    if (arch != llm_arch_name(model.arch)) {
        refuse("is for a model of architecture '" + arch + "', and this one is '" + llm_arch_name(model.arch) + "'");
    }
    const int64_t alpha = gguf_find_key(file, "adapter.lora.alpha");
    if (alpha < 0) {
        refuse("has no adapter.lora.alpha");
    }
    if (gguf_get_kv_type(file, alpha) != GGUF_TYPE_FLOAT32) {
        refuse("has an adapter.lora.alpha that is not a 32-bit float");
    }
    const float value = gguf_get_val_f32(file, alpha);
    if (!std::isfinite(value) || value == 0.0f) {
        refuse("has " + std::to_string(value) + " as adapter.lora.alpha");
    }
    if (gguf_find_key(file, "adapter.alora.invocation_tokens") >= 0) {
        refuse("is an activated LoRA, which works from certain tokens on; only plain ones can be applied");
    }
}

// One half of a pair, with its data read and looked at.
ggml_tensor read(const gguf_context * adapter, int64_t id, FILE * file) {
    const std::string name = gguf_get_tensor_name(adapter, id);
    ggml_tensor       t    = {};
    t.type                 = gguf_get_tensor_type(adapter, id);
    for (int dim = 0; dim < GGML_MAX_DIMS; ++dim) {
        t.ne[dim] = gguf_get_tensor_ne(adapter, id)[dim];
        if (t.ne[dim] < 1) {
            refuse("has a tensor '" + name + "' with an empty dimension");
        }
    }
    if (!mobilellm_is_weight_type(t.type)) {
        refuse("has a tensor '" + name + "' of type " + ggml_type_name(t.type) + ", which is not a weight type");
    }
    const size_t size  = gguf_get_tensor_size(adapter, id);
    const size_t start = gguf_get_data_offset(adapter) + gguf_get_tensor_offset(adapter, id);
    if (size > size_t(max_tensor) || std::fseek(file, 0, SEEK_END) != 0 || start + size > size_t(std::ftell(file)) ||
        std::fseek(file, long(start), SEEK_SET) != 0) {
        refuse("is truncated: its tensor '" + name + "' ends after the file does");
    }
    std::vector<uint8_t> data(size);
    if (std::fread(data.data(), 1, size, file) != size || !ggml_validate_row_data(t.type, data.data(), size)) {
        refuse("is damaged: its tensor '" + name + "' holds values that are not numbers");
    }
    return t;
}

std::string shape(const ggml_tensor & t) {
    return std::to_string(t.ne[1]) + " x " + std::to_string(t.ne[0]);
}

struct pair {
    int64_t a = -1;
    int64_t b = -1;
};

void check_pair(const llama_model & model, const std::string & name, const ggml_tensor & a, const ggml_tensor & b) {
    const ggml_tensor * weight = model.get_tensor(name.c_str());
    if (!weight) {
        refuse("changes '" + name + "', which this model does not have");
    }
    if (ggml_n_dims(weight) < 2) {
        refuse("changes the vector '" + name + "'; only matrices can be changed");
    }
    const bool table = weight == model.tok_embd;
    if (table && model.output && name == model.output->name) {
        refuse("changes '" + name + "', which is the output matrix as well in this model");
    }
    const int64_t rank = a.ne[table ? 0 : 1];
    const bool    fits = table ? a.ne[1] == weight->ne[1] && b.ne[1] == weight->ne[0] && b.ne[0] == rank
                               : a.ne[0] == weight->ne[0] && b.ne[1] == weight->ne[1] && b.ne[0] == rank;
    if (!fits || a.ne[2] != weight->ne[2] || b.ne[2] != weight->ne[2] || a.ne[3] != 1 || b.ne[3] != 1) {
        refuse("has " + shape(a) + " and " + shape(b) + " for '" + name + "', which is " + shape(*weight) +
               " in this model");
    }
}

}  // namespace

void mobilellm_check_adapter(const llama_model & model, const gguf_context * adapter, FILE * file) {
    check_metadata(model, adapter);

    std::map<std::string, pair> pairs;
    for (int64_t id = 0; id < gguf_get_n_tensors(adapter); ++id) {
        const std::string name = gguf_get_tensor_name(adapter, id);
        const size_t      dot  = name.rfind('.');
        const std::string half = dot == std::string::npos ? "" : name.substr(dot);
        if (half != ".lora_a" && half != ".lora_b") {
            refuse("holds '" + name + "', which is not half of a LoRA pair and could not be applied");
        }
        pair & found                            = pairs[name.substr(0, dot)];
        (half == ".lora_a" ? found.a : found.b) = id;
    }
    if (pairs.empty()) {
        refuse("changes nothing");
    }
    for (const auto & [name, halves] : pairs) {
        if (halves.a < 0 || halves.b < 0) {
            refuse("has only one half of '" + name + "'");
        }
        check_pair(model, name, read(adapter, halves.a, file), read(adapter, halves.b, file));
    }
}
