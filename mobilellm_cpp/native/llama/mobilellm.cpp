// The `mobilellm` architecture: metadata -> blocks -> graph. Stored blocks are loaded once; an executed
// layer is a copy of its block's tensor pointers, so it costs no memory but its own KV cache.

#include "mobilellm.h"

#include "gguf.h"
#include "llama-adapter.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cmath>
#include <numeric>

void llama_model_mobilellm::load_arch_hparams(llama_model_loader & ml) {
    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);

    schedule.resize(hparams.n_layer_all);
    std::iota(schedule.begin(), schedule.end(), 0u);

    // gguf.h and not ml.get_arr: the loader's templates for string keys are not instantiated
    const int64_t key = gguf_find_key(ml.metadata, "mobilellm.block_schedule");
    if (key >= 0) {
        const auto * blocks = static_cast<const uint32_t *>(gguf_get_arr_data(ml.metadata, key));
        schedule.assign(blocks, blocks + gguf_get_arr_n(ml.metadata, key));
    }

    const int64_t qk_norm = gguf_find_key(ml.metadata, "mobilellm.attention.qk_norm");
    hparams.use_kq_norm   = qk_norm >= 0 && gguf_get_val_bool(ml.metadata, qk_norm);

    ml.get_key(LLM_KV_ATTENTION_SLIDING_WINDOW, hparams.n_swa, false);
    if (hparams.n_swa > 0) {
        hparams.swa_type                  = LLAMA_SWA_TYPE_STANDARD;
        hparams.rope_freq_base_train_swa  = hparams.rope_freq_base_train;
        hparams.rope_freq_scale_train_swa = hparams.rope_freq_scale_train;
    }

    // upstream asks per executed layer; mobilellm_check_file has bounded every index
    const int64_t       windows = gguf_find_key(ml.metadata, "mobilellm.attention.sliding_window_pattern");
    const int64_t       ropes   = gguf_find_key(ml.metadata, "mobilellm.attention.rope_pattern");
    const llama_hparams stored  = hparams;
    for (size_t il = 0; il < schedule.size(); ++il) {
        hparams.n_head_arr[il]    = stored.n_head_arr[schedule[il]];
        hparams.n_head_kv_arr[il] = stored.n_head_kv_arr[schedule[il]];
        hparams.n_ff_arr[il]      = stored.n_ff_arr[schedule[il]];
        hparams.is_swa_impl[il] =
            windows >= 0 && static_cast<const bool *>(gguf_get_arr_data(ml.metadata, windows))[schedule[il]];
        hparams.rope_pattern[il] =
            ropes < 0 ? 1 : static_cast<const uint32_t *>(gguf_get_arr_data(ml.metadata, ropes))[schedule[il]];
    }
    hparams.n_layer_all = schedule.size();
}

void llama_model_mobilellm::load_arch_tensors(llama_model_loader &) {
    LLAMA_LOAD_LOCALS;

    tok_embd    = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), { n_embd, n_vocab }, 0);
    output_norm = create_tensor(tn(LLM_TENSOR_OUTPUT_NORM, "weight"), { n_embd }, 0);
    output      = create_tensor(tn(LLM_TENSOR_OUTPUT, "weight"), { n_embd, n_vocab }, TENSOR_NOT_REQUIRED);
    if (output == nullptr) {  // embedding sharing
        output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), { n_embd, n_vocab }, TENSOR_DUPLICATED);
    }

    const uint32_t n_stored = *std::max_element(schedule.begin(), schedule.end()) + 1;

    std::vector<llama_layer> blocks(n_stored);
    for (uint32_t ib = 0; ib < n_stored; ++ib) {
        llama_layer & block = blocks[ib];

        block.attn_norm = create_tensor(tn(LLM_TENSOR_ATTN_NORM, "weight", ib), { n_embd }, 0);
        block.wq        = create_tensor(tn(LLM_TENSOR_ATTN_Q, "weight", ib), { n_embd, n_embd_head_k * n_head }, 0);
        block.wk        = create_tensor(tn(LLM_TENSOR_ATTN_K, "weight", ib), { n_embd, n_embd_k_gqa }, 0);
        block.wv        = create_tensor(tn(LLM_TENSOR_ATTN_V, "weight", ib), { n_embd, n_embd_v_gqa }, 0);
        block.wo        = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "weight", ib), { n_embd_head_v * n_head, n_embd }, 0);

        block.ffn_norm = create_tensor(tn(LLM_TENSOR_FFN_NORM, "weight", ib), { n_embd }, 0);
        block.ffn_gate = create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", ib), { n_embd, n_ff }, 0);
        block.ffn_up   = create_tensor(tn(LLM_TENSOR_FFN_UP, "weight", ib), { n_embd, n_ff }, 0);
        block.ffn_down = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", ib), { n_ff, n_embd }, 0);
    }
    for (size_t il = 0; il < schedule.size(); ++il) {
        layers[il] = blocks[schedule[il]];
    }
}

std::unique_ptr<llm_graph_context> llama_model_mobilellm::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

llama_model_mobilellm::graph::graph(const llama_model_mobilellm & model, const llm_graph_params & params) :
    llm_graph_context(params) {
    // an input that no node reads is never allocated, and filling it would abort
    bool any_rope = false;
    for (int il = 0; il < n_layer; ++il) {
        any_rope = any_rope || hparams.has_rope(il);
    }
    ggml_tensor * cur       = build_inp_embd(model.tok_embd);
    ggml_tensor * positions = any_rope ? build_inp_pos() : nullptr;
    auto *        kv        = hparams.n_swa > 0 ? nullptr : build_attn_inp_kv();
    auto *        kv_iswa   = hparams.n_swa > 0 ? build_attn_inp_kv_iswa() : nullptr;
    ggml_tensor * out_ids   = build_inp_out_ids();

    for (int il = 0; il < n_layer; ++il) {
        const llama_layer & block = model.layers[il];

        res->t_layer_inp[il] = cur;

        ggml_tensor * inp = cur;
        cur = kv ? attention(block, inp, positions, kv, il) : attention(block, inp, positions, kv_iswa, il);
        if (il == n_layer - 1 && out_ids) {  // from here on only the tokens whose output was asked for
            cur = ggml_get_rows(ctx0, cur, out_ids);
            inp = ggml_get_rows(ctx0, inp, out_ids);
        }
        cur = ggml_add(ctx0, cur, inp);
        cb(cur, "ffn_inp", il);

        cur = ggml_add(ctx0, feed_forward(block, cur, il), cur);
        cb(cur, "ffn_out", il);

        cur = build_cvec(cur, il);
        cb(cur, "l_out", il);
    }

    cur = build_norm(cur, model.output_norm, nullptr, LLM_NORM_RMS, -1);
    cb(cur, "result_norm", -1);
    res->t_embd = cur;

    cur = build_lora_mm(model.output, cur, model.output_s);
    cb(cur, "result_output", -1);
    res->t_logits = cur;

    ggml_build_forward_expand(gf, cur);
}

template <typename KV>
ggml_tensor * llama_model_mobilellm::graph::attention(const llama_layer & block, ggml_tensor * inp,
                                                      ggml_tensor * positions, KV * kv, int il) {
    const int64_t n_embd_head = hparams.n_embd_head_k();

    ggml_tensor * cur = build_norm(inp, block.attn_norm, nullptr, LLM_NORM_RMS, il);
    cb(cur, "attn_norm", il);

    // q: (n_embd_head, n_head, n_tokens), k and v: (n_embd_head, n_head_kv, n_tokens)
    auto [q, k, v] = build_qkv(block, cur, n_embd_head, n_head, n_head_kv, il);

    if (hparams.has_rope(il)) {
        q = ggml_rope_ext(ctx0, q, positions, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor,
                          attn_factor, beta_fast, beta_slow);
        k = ggml_rope_ext(ctx0, k, positions, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor,
                          attn_factor, beta_fast, beta_slow);
        if (hparams.use_kq_norm) {  // Llama 4: of each head, without weights, and only where RoPE is applied
            q = ggml_rms_norm(ctx0, q, hparams.f_norm_rms_eps);
            k = ggml_rms_norm(ctx0, k, hparams.f_norm_rms_eps);
        }
    }
    cb(q, "Qcur", il);
    cb(k, "Kcur", il);
    cb(v, "Vcur", il);

    cur = build_attn(kv, block.wo, nullptr, nullptr, q, k, v, nullptr, nullptr, nullptr,
                     1.0f / std::sqrt(float(n_embd_head)), il);
    cb(cur, "attn_out", il);
    return cur;
}

ggml_tensor * llama_model_mobilellm::graph::feed_forward(const llama_layer & block, ggml_tensor * inp, int il) {
    ggml_tensor * cur = build_norm(inp, block.ffn_norm, nullptr, LLM_NORM_RMS, il);
    cb(cur, "ffn_norm", il);

    // SwiGLU: down(silu(gate(x)) * up(x))
    return build_ffn(cur, block.ffn_up, nullptr, nullptr, block.ffn_gate, nullptr, nullptr, block.ffn_down, nullptr,
                     nullptr, nullptr, LLM_FFN_SILU, LLM_FFN_PAR, il);
}

uint32_t mobilellm_graph_max_nodes(const llama_model & model) {
    // upstream's rule, 8 nodes a tensor, over executed layers of 9 tensors
    const uint32_t n_layer = model.hparams.n_layer();

    uint32_t res = 1024u + 8u * 9u * n_layer;
    for (const auto & lora : model.loras) {
        res += lora->get_n_nodes() * n_layer;  // one stored block may run in every layer
    }
    return res;
}
