// The graph whose blocks kernels/fused.h runs as one node, for the models and requests it knows.

#include "fused.h"

#include "ggml-backend.h"
#include "llama-adapter.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "mobilellm.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <set>
#include <string>
#include <string_view>

namespace {

using mobilellm::fused_cache;
using mobilellm::fused_interface;
using mobilellm::fused_layer;
using mobilellm::fused_model;
using mobilellm::fused_step;

const fused_interface * fused_kernels() {
    static const fused_interface * const kernels = [] {
        const ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        const ggml_backend_reg_t reg = cpu ? ggml_backend_dev_backend_reg(cpu) : nullptr;
        return reg ? static_cast<const fused_interface *>(ggml_backend_reg_get_proc_address(reg, "mobilellm_fused"))
                   : nullptr;
    }();
    return kernels;
}

// Whether the file says nothing of the model that the node does not compute: a key that nobody listed may change
// the ordinary graph. What stands in arrays is compared below.
bool knows_all_keys(const llama_model & model) {
    const std::string prefix = std::string(llm_arch_name(model.arch)) + ".";
    return std::all_of(model.gguf_kv.begin(), model.gguf_kv.end(), [&](const auto & pair) {
        const std::string_view key = pair.first;
        if (key.substr(0, prefix.size()) != prefix) {
            return true;
        }
        const mobilellm_key * known  = mobilellm_find_key(key.substr(prefix.size()));
        const bool            window = key.find(".sliding_window") != key.npos;  // what it is to others is not known
        return known && known->fused && (!window || model.arch == LLM_ARCH_MOBILELLM);
    });
}

// A Llama as its simplest: nine tensors a block and nothing else, all layers alike but for a window.
bool is_plain(const llama_model & model) {
    const llama_hparams & h       = model.hparams;
    const uint32_t        n_layer = h.n_layer();

    if ((model.arch != LLM_ARCH_LLAMA && model.arch != LLM_ARCH_MOBILELLM) || n_layer == 0 || !model.devices.empty() ||
        h.n_layer_nextn > 0 || h.n_expert > 0 || h.use_alibi || h.attn_soft_cap || h.f_clamp_kqv > 0.0f ||
        h.n_embd_head_k() != h.n_embd_head_v() || h.n_rot() != h.n_embd_head_k() || h.n_embd_inp() != h.n_embd ||
        h.n_deepstack_layers > 0 || h.n_cls_out != 1 ||
        ((h.swa_type != LLAMA_SWA_TYPE_NONE || h.use_kq_norm) && model.arch != LLM_ARCH_MOBILELLM) ||
        !knows_all_keys(model)) {
        return false;
    }
    std::set<const ggml_tensor *> blocks;
    for (uint32_t il = 0; il < n_layer; ++il) {
        const llama_layer & l = model.layers[il];
        blocks.insert(l.wq);
        if (!l.attn_norm || !l.wq || !l.wk || !l.wv || !l.wo || !l.ffn_norm || !l.ffn_gate || !l.ffn_up ||
            !l.ffn_down || h.n_head(il) != h.n_head() || h.n_head_kv(il) != h.n_head_kv() || h.n_ff(il) != h.n_ff()) {
            return false;
        }
    }
    const auto in_block = [](const auto & named) { return named.first.compare(0, 4, "blk.") == 0; };
    const auto n        = std::count_if(model.tensors_by_name.begin(), model.tensors_by_name.end(), in_block);
    return size_t(n) == 9 * blocks.size();
}

// The KV cache of all layers or those of full and of sliding ones; none where it is something else.
std::vector<const llama_kv_cache_context *> caches_of(const llama_memory_context_i * memory) {
    if (const auto * both = dynamic_cast<const llama_kv_cache_iswa_context *>(memory)) {
        return { both->get_base(), both->get_swa() };
    }
    if (const auto * one = dynamic_cast<const llama_kv_cache_context *>(memory)) {
        return { one };
    }
    return {};
}

// Tokens through every layer, and nobody looks at what lies between.
bool is_plain(const llm_graph_params & params) {
    const llama_cparams & c = params.cparams;

    const bool step = params.gtype == LLM_GRAPH_TYPE_DEFAULT || params.gtype == LLM_GRAPH_TYPE_DECODER;
    const bool seen =
        c.embeddings_nextn || (c.cb_eval && c.cb_eval != mobilellm_at_final_norm) ||
        std::find(c.embeddings_layer_inp.begin(), c.embeddings_layer_inp.end(), true) != c.embeddings_layer_inp.end();
    return step && !seen && c.causal_attn && !c.training && !caches_of(params.mctx).empty();
}

// A pair as the step reads it. It is packed once, where `extra` of its first half points, and lives as long as the
// adapter.
const void * packed(llama_adapter_lora & adapter, const llama_adapter_lora_weight & pair, bool wide) {
    static std::mutex                 packing;
    const std::lock_guard<std::mutex> lock(packing);
    if (!pair.a->extra) {
        const size_t size = fused_kernels()->pair_size(pair.a, pair.b, wide) + 64;
        adapter.ctxs.emplace_back(ggml_init({ size + ggml_tensor_overhead() + 64, nullptr, /*no_alloc*/ false }));
        const auto memory = uintptr_t(ggml_new_tensor_1d(adapter.ctxs.back().get(), GGML_TYPE_I8, int64_t(size))->data);
        auto * const out  = reinterpret_cast<void *>(GGML_PAD(memory, 64));
        fused_kernels()->pack_pair(pair.a, pair.b, wide, out);
        pair.a->extra = out;
    }
    return pair.a->extra;
}

thread_local bool states_alone = false;  // of the calling thread's next steps

// What the step reads beside upstream's inputs. Keeps the step alive as long as the graph that runs it; a request that
// is no longer plain gets a new graph.
struct graph_input_step : public llm_graph_input_i {
    graph_input_step(fused_step * step, ggml_tensor * node, const fused_model & model,
                     const std::vector<const llama_kv_cache_context *> & contexts) :
        step(step), node(node), caches(model.caches), n_streams(model.n_streams) {
        for (const llama_kv_cache_context * context : contexts) {
            kv_caches.push_back(context->mobilellm_cache());
        }
    }
    ~graph_input_step() override { fused_kernels()->destroy(step); }

    void set_input(const llama_ubatch * ubatch) override {
        values.clear();
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            values.push_back(ubatch->seq_id[i][0]);
        }
        for (size_t c = 0; c < caches.size(); ++c) {
            for (int64_t s = 0; s < n_streams; ++s) {
                const llama_seq_id     seq   = ubatch->seq_id[s * ubatch->n_tokens / n_streams][0];
                const llama_kv_cells & cells = kv_caches[c]->get_cells(seq);
                for (int64_t i = 0; i < caches[c].n_kv; ++i) {
                    values.push_back(cells.is_empty(i) ? -1 : cells.pos_get(i));
                }
            }
        }
        ggml_backend_tensor_set(node->src[3], values.data(), 0, ggml_nbytes(node->src[3]));
        fused_kernels()->plan(step, node);
    }

    bool can_reuse(const llm_graph_params & params) override {
        return is_plain(params) && without_logits == states_alone;
    }

    fused_step * const                  step;
    ggml_tensor * const                 node;
    const std::vector<fused_cache>      caches;
    std::vector<const llama_kv_cache *> kv_caches;
    const int64_t                       n_streams;
    const bool                          without_logits = states_alone;
    std::vector<int32_t>                values;
};

struct fused_graph : public llm_graph_context {
    explicit fused_graph(const llm_graph_params & params) : llm_graph_context(params) {}

    // False, with nothing in the graph, where the kernels do not know the model.
    bool build(const llama_model & model) {
        fused_model m;
        if (!describe(model, m)) {
            return false;
        }
        m.output = cparams.cb_eval || cparams.embeddings || states_alone || model.output_s || adapted(model.output)
                       ? nullptr
                       : model.output;
        fused_step * step = fused_kernels()->create(m);
        if (!step && m.output) {  // a matrix of another type
            m.output = nullptr;
            step     = fused_kernels()->create(m);
        }
        if (!step) {
            return false;
        }
        int64_t n_numbers = n_tokens;
        for (const fused_cache & cache : m.caches) {
            n_numbers += cache.n_kv * m.n_streams;
        }
        ggml_tensor * numbers = ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, n_numbers);
        ggml_set_input(numbers);
        std::vector<ggml_tensor *> args = { build_inp_embd(model.tok_embd), build_inp_pos(), build_inp_out_ids(),
                                            numbers };
        if (m.caches.size() == 1) {
            const auto * kv = build_attn_inp_kv();
            args.insert(args.end(), { kv->get_k_idxs(), kv->get_kq_mask() });
        } else {
            auto * kv           = build_attn_inp_kv_iswa();
            kv->self_v_idxs     = nullptr;  // nobody reads them: they would be filled without memory
            kv->self_v_idxs_swa = nullptr;
            args.insert(args.end(),
                        { kv->get_k_idxs(), kv->get_kq_mask(), kv->get_k_idxs_swa(), kv->get_kq_mask_swa() });
        }
        // a node without elements is not run, but the cache must be written
        const int64_t n_rows = m.output ? m.output->ne[1] : n_embd;
        ggml_tensor * node =
            ggml_custom_4d(ctx0, GGML_TYPE_F32, n_rows, std::max<int64_t>(n_outputs, 1), 1, 1, args.data(),
                           int(args.size()), fused_kernels()->run, GGML_N_TASKS_MAX, step);
        res->add_input(std::make_unique<graph_input_step>(step, node, m, caches_of(mctx)));

        ggml_tensor * result = ggml_view_2d(ctx0, node, n_rows, n_outputs, node->nb[1], 0);
        if (!m.output) {
            res->t_embd = result;
            cb(res->t_embd, "result_norm", -1);
            result = states_alone ? nullptr : build_lora_mm(model.output, result, model.output_s);
        }
        ggml_build_forward_expand(gf, node);
        if (result) {
            res->t_logits = result;
            cb(res->t_logits, "result_output", -1);
        }
        ggml_build_forward_expand(gf, result ? result : res->t_embd);
        return true;
    }

  private:
    bool adapted(ggml_tensor * weight) const {
        return std::any_of(loras->begin(), loras->end(),
                           [&](const auto & used) { return used.first->get_weight(weight) != nullptr; });
    }

    // What the adapters in use add to the matrices of the blocks; false where one changes anything else. (The output
    // matrix gets a node of its own then, and upstream takes the rows of the embedding.)
    bool describe_adapters(const llama_model & model, fused_model & m) {
        std::set<ggml_tensor *> matrices;
        for (const llama_layer & l : model.layers) {
            matrices.insert({ l.wq, l.wk, l.wv, l.wo, l.ffn_gate, l.ffn_up, l.ffn_down });
        }
        for (const auto & [adapter, factor] : *loras) {
            size_t known = adapter->get_weight(model.output) != nullptr;
            known += model.tok_embd != model.output && adapter->get_weight(model.tok_embd) != nullptr;
            for (ggml_tensor * weight : matrices) {
                if (const llama_adapter_lora_weight * pair = adapter->get_weight(weight)) {
                    m.pairs.push_back({ weight, packed(*adapter, *pair, !ggml_is_quantized(weight->type)),
                                        pair->a->ne[1], pair->get_scale(adapter->alpha, factor) });
                    ++known;
                }
            }
            if (known != adapter->ab_map.size()) {
                return false;
            }
        }
        return true;
    }

    bool describe(const llama_model & model, fused_model & m) {
        const auto contexts = caches_of(mctx);
        if (!describe_adapters(model, m)) {
            return false;
        }
        for (const llama_kv_cache_context * context : contexts) {
            m.caches.push_back({ context->get_n_kv(), 1 });  // of no layer, perhaps
        }

        for (int il = 0; il < n_layer; ++il) {
            const llama_layer & l       = model.layers[il];
            const bool          rope    = model.arch == LLM_ARCH_LLAMA || hparams.has_rope(il);
            const int           cache   = contexts.size() > 1 && hparams.is_swa(il);
            const ggml_tensor * control = cvec ? cvec->tensor_for(il) : nullptr;
            const ggml_tensor * k       = contexts[cache]->get_k(ctx0, il);
            const ggml_tensor * v       = contexts[cache]->get_v(ctx0, il);
            m.layers.push_back({ l.attn_norm, l.wq, l.wk, l.wv, l.wo, l.ffn_norm, l.ffn_gate, l.ffn_up, l.ffn_down, k,
                                 v, control, rope, rope && hparams.use_kq_norm, cache });
            m.caches[cache].size = k->view_src->ne[1];

            const ggml_tensor * factors = model.get_rope_factors(cparams, il);
            if (il > 0 && (factors ? factors->data : nullptr) != (m.rope_factors ? m.rope_factors->data : nullptr)) {
                return false;
            }
            m.rope_factors = factors;
            for (const ggml_tensor * t :
                 std::initializer_list<const ggml_tensor *>{ k->view_src, v->view_src, control, factors }) {
                if (t && (!t->buffer || !ggml_backend_buffer_is_host(t->buffer))) {
                    return false;
                }
            }
        }
        m.output_norm = model.output_norm;
        m.n_tokens    = n_tokens;
        m.n_seqs      = ubatch.n_seqs_unq;
        m.n_streams   = cparams.kv_unified ? 1 : ubatch.n_seqs_unq;
        m.n_outputs   = n_outputs;
        m.n_embd      = n_embd;
        m.n_ff        = hparams.n_ff();
        m.n_head      = n_head;
        m.n_head_kv   = n_head_kv;
        m.n_embd_head = n_embd_head_k;
        m.eps         = norm_rms_eps;
        m.kq_scale =
            hparams.f_attention_scale == 0.0f ? 1.0f / std::sqrt(float(n_embd_head_k)) : hparams.f_attention_scale;

        m.rope_freq_base   = freq_base;
        m.rope_freq_scale  = freq_scale;
        m.rope_attn_factor = attn_factor;
        m.rope_ext_factor  = ext_factor;
        ggml_rope_yarn_corr_dims(int(n_rot), n_ctx_orig, freq_base, beta_fast, beta_slow, m.rope_corr_dims);

        const ggml_tensor * k_rotation = contexts[0]->build_input_k_rot(ctx0);
        const ggml_tensor * v_rotation = contexts[0]->build_input_v_rot(ctx0);
        m.k_rotation                   = k_rotation ? k_rotation->ne[0] : 0;
        m.v_rotation                   = v_rotation ? v_rotation->ne[0] : 0;
        return true;
    }
};

}  // namespace

bool mobilellm_values_as_rows(const llama_model & model) {
    const auto packed = [](const llama_layer & l) {
        const auto matrices = { l.wq, l.wk, l.wv, l.wo, l.ffn_gate, l.ffn_up, l.ffn_down };
        return std::all_of(matrices.begin(), matrices.end(), fused_kernels()->packed);
    };
    return fused_kernels() && is_plain(model) && std::all_of(model.layers.begin(), model.layers.end(), packed);
}

void mobilellm_want_states_alone(bool alone) {
    states_alone = alone;
}

int64_t mobilellm_fused_runs() {
    return fused_kernels() ? fused_kernels()->n_runs() : 0;
}

std::unique_ptr<llm_graph_context> mobilellm_graph(const llama_model & model, const llm_graph_params & params) {
    if (fused_kernels() && is_plain(params) && is_plain(model)) {
        auto graph = std::make_unique<fused_graph>(params);
        if (graph->build(model)) {
            return graph;
        }
    }
    return model.build_arch_graph(params);
}
