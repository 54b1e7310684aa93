// The step's arrays and what both of its ways compute with, for some tokens and some rows.

#include "fused.h"

#include "fused_step.h"
#include "ggml-impl.h"
#include "packed_buffer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>

namespace mobilellm {

namespace {

size_t size_of(const matrix & w) {
    return packed_size(w.type, w.n_cols, w.n_rows);
}

bool is_matrix(const ggml_tensor * t, int64_t n_cols, int64_t n_rows) {
    return packed(t) && t->ne[0] == n_cols && t->ne[1] == n_rows;
}

bool is_vector(const ggml_tensor * t, int64_t n) {
    return t->type == GGML_TYPE_F32 && t->ne[0] == n && ggml_nelements(t) == n && ggml_is_contiguous(t) && t->data;
}

// Of a type that ggml turns into floats and back, with rows of heads.
bool is_cache(const ggml_tensor * t) {
    const ggml_type_traits & type  = *ggml_get_type_traits(t->type);
    const bool               known = t->type == GGML_TYPE_F32 || (type.to_float && type.from_float_ref);
    return known && t->nb[1] <= t->nb[2] && t->data;
}

}  // namespace

bool fused_step::knows(const fused_model & m) {
    const int64_t q_size  = m.n_head * m.n_embd_head;
    const int64_t kv_size = m.n_head_kv * m.n_embd_head;

    bool yes = m.n_head % m.n_head_kv == 0 && m.n_embd_head % BLOCK == 0 && m.n_embd_head <= max_embd_head &&
               is_vector(m.output_norm, m.n_embd) &&
               (!m.rope_factors || is_vector(m.rope_factors, m.n_embd_head / 2)) &&
               (!m.output || is_matrix(m.output, m.n_embd, m.output->ne[1]));
    for (const fused_layer & l : m.layers) {
        yes = yes && is_vector(l.attn_norm, m.n_embd) && is_vector(l.ffn_norm, m.n_embd);
        yes = yes && is_matrix(l.wq, m.n_embd, q_size) && is_matrix(l.wk, m.n_embd, kv_size) &&
              is_matrix(l.wv, m.n_embd, kv_size) && is_matrix(l.wo, q_size, m.n_embd);
        yes = yes && is_matrix(l.ffn_gate, m.n_embd, m.n_ff) && is_matrix(l.ffn_up, m.n_embd, m.n_ff) &&
              is_matrix(l.ffn_down, m.n_ff, m.n_embd);
        yes = yes && is_cache(l.k) && is_cache(l.v) && (!l.control || is_vector(l.control, m.n_embd));
    }
    return yes;
}

fused_step::fused_step(const fused_model & model) : model_(model), taken_(model.layers.size() + 1) {
    const fused_model & m = model_;

    q_size_   = m.n_head * m.n_embd_head;
    qkv_size_ = q_size_ + 2 * m.n_head_kv * m.n_embd_head;
    n_group_  = m.n_head / m.n_head_kv;

    const auto cache_of = [](const ggml_tensor * t) {
        return head_cache{ static_cast<uint8_t *>(t->data), t->type, int64_t(t->nb[2]), int64_t(t->nb[1]),
                           int64_t(t->nb[3]) };
    };
    for (const fused_layer & l : m.layers) {
        layers_.push_back({ static_cast<const float *>(l.attn_norm->data),
                            static_cast<const float *>(l.ffn_norm->data),
                            { with_pairs(l.wq), with_pairs(l.wk), with_pairs(l.wv) },
                            with_pairs(l.wo),
                            with_pairs(l.ffn_gate),
                            with_pairs(l.ffn_up),
                            with_pairs(l.ffn_down),
                            cache_of(l.k),
                            cache_of(l.v),
                            l.control ? static_cast<const float *>(l.control->data) : nullptr,
                            l.rope,
                            l.qk_norm,
                            l.cache,
                            nullptr });
    }
    for (size_t il = 1; il + 1 < layers_.size(); ++il) {
        const auto same = [&](size_t a, size_t b) { return layers_[a].wo.data == layers_[b].wo.data; };
        if (same(il - 1, il) && !same(il, il + 1)) {
            layers_[il].later = &layers_[il + 1];
        }
    }
    if (m.output) {
        output_ = as_matrix(m.output);
    }
    const layer & block = layers_.front();
    block_size_         = size_of(block.qkv[0]) + size_of(block.qkv[1]) + size_of(block.qkv[2]) + size_of(block.wo) +
                  size_of(block.gate) + size_of(block.up) + size_of(block.down);

    few_ = m.n_tokens <= std::min(max_few, few_a_seq * std::max(m.n_seqs, int64_t(1)));

    const int64_t longest = std::max({ m.n_embd, m.n_ff, q_size_ });
    const int64_t n       = few_ ? m.n_tokens : std::min(m.n_tokens, tile_tokens);
    n_lists_              = few_ ? m.n_tokens : std::min(m.n_tokens, m.n_tokens / tile_tokens + max_threads + m.n_seqs);

    bool bytes  = output_.data && !is_float(output_.type);
    bool floats = output_.data && is_float(output_.type);
    for (const layer & l : layers_) {
        for (const matrix * w : { &l.qkv[0], &l.qkv[1], &l.qkv[2], &l.wo, &l.gate, &l.up, &l.down }) {
            (is_float(w->type) ? floats : bytes) = true;
        }
    }
    const auto add_input = [&](input_rows & rows, int64_t n_rows, int64_t n_cols) {
        rows = {};
        if (bytes) {
            arena_.add(rows.bytes, n_rows * activation_size(n_cols) / sizeof(activations) + 1);
        }
        if (floats) {
            arena_.add(rows.floats, n_rows * n_cols);
        }
    };
    for (private_arrays & own : private_) {
        arena_.add(own.vector, std::max(longest, slice_floats));
        arena_.add(own.gate, slice_floats);
        arena_.add(own.up, slice_floats);
        add_input(own.input, n, longest);
        arena_.add(own.thin, 2 * n * thin_size_);
        if (few_) {
            arena_.add(own.x, n * m.n_embd);
            arena_.add(own.rope, n * m.n_embd_head);
            arena_.add(own.q, q_size_);
            arena_.add(own.scores, n_group_ * max_scores);
            arena_.add(own.cells, 2 * max_scores * m.n_embd_head);
        } else {
            arena_.add(own.rows, n * std::max(q_size_, m.n_embd));
            add_input(own.hidden, n, m.n_ff);
            arena_.add(own.tile, attention_tile_work(m.n_embd_head, n_group_));
        }
    }
    arena_.add(qkv_, m.n_tokens * qkv_size_);
    for (size_t c = 0; c < m.caches.size(); ++c) {
        arena_.add(lists_[c].cells, n_lists_ * m.caches[c].n_kv);
        arena_.add(lists_[c].n_cells, n_lists_);
        arena_.add(lists_[c].seen, few_ ? 0 : n_lists_ * m.caches[c].n_kv);
    }
    if (few_) {
        arena_.add(out_, n * max_shards * q_size_);
        arena_.add(largest_, n * max_shards * m.n_head);
        arena_.add(sum_, n * max_shards * m.n_head);
        arena_.add(update_, n * m.n_embd);
        add_input(hidden_, n, m.n_ff);
    } else {
        arena_.add(x_, m.n_tokens * m.n_embd);
        arena_.add(rope_, m.n_tokens * m.n_embd_head);
        chunks_.reserve(n_lists_);
        pieces_.reserve(n_lists_);
        all_.resize(m.n_tokens);
        std::iota(all_.begin(), all_.end(), 0);
        add_input(last_, m.n_outputs, m.n_embd);
    }
    arena_.allocate();
}

// Of the calling thread.
static thread_local int64_t own_runs = 0;

void fused_step::run(ggml_tensor * dst, int ith, int nth) {
    nth = std::min(nth, max_threads);
    if (ith >= nth) {
        return;
    }
    const fused_request r(dst, model_);
    own_runs += ith == 0;
    if (few_) {
        share_rows(r, ith, nth);
    } else {
        share_tokens(r, ith, nth);
    }
}

thread_limit & own_thread_limit() {
    static thread_local thread_limit limit;
    return limit;
}

int fused_step::n_threads() {
    return few_ ? own_thread_limit().threads() : max_threads;
}

// cos and sin of each pair, the angles multiplied up in float as ggml does, and YaRN (arXiv 2309.00071) as there
void fused_step::rope_angles(int32_t position, float * rope) const {
    const fused_model & m       = model_;
    const float         ratio   = std::pow(m.rope_freq_base, -2.0f / float(m.n_embd_head));
    const auto *        factors = m.rope_factors ? static_cast<const float *>(m.rope_factors->data) : nullptr;
    const float         size    = m.rope_ext_factor == 0.0f
                                      ? m.rope_attn_factor
                                      : m.rope_attn_factor * (1.0f + 0.1f * std::log(1.0f / m.rope_freq_scale));
    float               theta   = float(position);
    for (int64_t i = 0; i < m.n_embd_head; i += 2) {
        const float far   = factors ? theta / factors[i / 2] : theta;
        float       angle = far * m.rope_freq_scale;
        if (m.rope_ext_factor != 0.0f) {
            const float along =
                (float(i / 2) - m.rope_corr_dims[0]) / std::max(0.001f, m.rope_corr_dims[1] - m.rope_corr_dims[0]);
            const float mix = (1.0f - std::clamp(along, 0.0f, 1.0f)) * m.rope_ext_factor;
            angle           = angle * (1.0f - mix) + far * mix;
        }
        rope[i]     = std::cos(angle) * size;
        rope[i + 1] = std::sin(angle) * size;
        theta *= ratio;
    }
}

void fused_step::normalize(const private_arrays & own, const float * x, int64_t n_tokens, const float * weight) const {
    const int64_t n_embd = model_.n_embd;
    for (int64_t t = 0; t < n_tokens; ++t) {
        ops_.rms_norm(x + t * n_embd, weight, n_embd, model_.eps, own.vector);
        give(own.input, n_embd, t, 0, own.vector, n_embd);
    }
}

// n columns of a token's row.
void fused_step::give(const input_rows & rows, int64_t n_cols, int64_t token, int64_t column, const float * x,
                      int64_t n) const {
    if (rows.bytes) {
        kernels_.quantize(x, n, row_of(rows.bytes, token, n_cols) + column / BLOCK);
    }
    if (rows.floats) {
        std::copy(x, x + n, rows.floats + token * n_cols + column);
    }
}

projection fused_step::with_pairs(const ggml_tensor * weight) {
    projection result{ as_matrix(weight), {} };
    int64_t    size = 0;
    for (const fused_pair & pair : model_.pairs) {
        if (pair.weight == weight) {
            result.pairs.push_back(
                as_low_rank(pair.packed, weight->ne[0], weight->ne[1], pair.rank, is_float(weight->type), pair.scale));
            size += padded_rank(pair.rank);
        }
    }
    thin_size_ = std::max(thin_size_, size);
    return result;
}

// What the first halves of the matrix's pairs make of the input: every thread does it for itself, for rows are few.
void fused_step::reduce(const projection & w, const input_rows & input, int64_t n_tokens, float * thin) const {
    for (const low_rank & pair : w.pairs) {
        ops_.reduce(pair, input, n_tokens, thin, thin_size_);
        thin += padded_rank(pair.rank);
    }
}

void fused_step::matmul(const matrix & w, range groups, const input_rows & input, int64_t n_tokens, float * y,
                        int64_t stride, const void * next, const uint8_t * later) const {
    const void * x = is_float(w.type) ? static_cast<const void *>(input.floats) : input.bytes;
    mobilellm::multiply(w, groups.begin, groups.end, x, n_tokens, y, stride, next, later);
}

// With what `reduce` made of the same input: the product and what adapters add.
void fused_step::multiply(const projection & w, range groups, const input_rows & input, int64_t n_tokens,
                          const float * thin, float * y, int64_t stride, const void * next,
                          const uint8_t * later) const {
    matmul(w, groups, input, n_tokens, y, stride, next, later);
    for (const low_rank & pair : w.pairs) {
        ops_.expand(pair, groups.begin, groups.end, thin, thin_size_, n_tokens, y, stride);
        thin += padded_rank(pair.rank);
    }
}

// Neighbours by their angles: a loop that compilers vectorize.
static void rotate(float * __restrict x, const float * __restrict angles, int64_t n) {
    for (int64_t e = 0; e < n; e += 2) {
        const float cos = angles[e];
        const float sin = angles[e + 1];
        const float a   = x[e];
        const float b   = x[e + 1];
        x[e]            = a * cos - b * sin;
        x[e + 1]        = a * sin + b * cos;
    }
}

// This thread's rows of q, k and v with their RoPE.
void fused_step::project_qkv(const layer & l, const layer * later, const private_arrays & own, int64_t n_tokens,
                             const float * rope, float * qkv, int ith, int nth) const {
    const int64_t n_embd_head = model_.n_embd_head;

    const int64_t all  = l.qkv[0].n_groups() + l.qkv[1].n_groups() + l.qkv[2].n_groups();
    const range   mine = share(all, ith, nth);

    int64_t first = 0;  // group of this matrix
    for (int i = 0; i < 3; first += l.qkv[i].n_groups(), ++i) {
        const projection & w     = l.qkv[i];
        const int64_t      begin = std::max(mine.begin - first, int64_t(0));
        const int64_t      end   = std::min(mine.end - first, w.n_groups());
        if (begin >= end) {
            continue;
        }
        float *         y    = qkv + (first + begin) * GROUP;
        const uint8_t * next = i < 2 && end == w.n_groups() ? l.qkv[i + 1].data : nullptr;
        reduce(w, own.input, n_tokens, own.thin);
        multiply(w, { begin, end }, own.input, n_tokens, own.thin, y, qkv_size_, next,
                 later ? later->qkv[i].data : nullptr);
        for (int64_t t = 0; l.rope && i < 2 && t < n_tokens; ++t) {
            const float * angles = rope + t * n_embd_head;
            float *       row    = y + t * qkv_size_;
            int64_t       at     = begin * GROUP % n_embd_head;  // in its head
            for (int64_t e = 0; e < (end - begin) * GROUP; at = 0) {
                const int64_t n = std::min(n_embd_head - at, (end - begin) * GROUP - e);
                rotate(row + e, angles + at, n);
                e += n;
            }
        }
    }
}

void fused_step::control(const layer & l, float * x, int64_t n_tokens) const {
    for (int64_t t = 0; l.control && t < n_tokens; ++t) {
        ops_.add(x + t * model_.n_embd, l.control, model_.n_embd);
    }
}

// Heads of q or k, in place, as they are multiplied, and k as the cache holds it.
void fused_step::ready_for_scores(const layer & l, float * heads, int64_t n) const {
    const int64_t n_embd_head = model_.n_embd_head;
    for (int64_t i = 0; l.qk_norm && i < n; ++i) {
        ops_.rms_norm(heads + i * n_embd_head, nullptr, n_embd_head, model_.eps, heads + i * n_embd_head);
    }
    if (model_.k_rotation) {
        ops_.hadamard(heads, n * n_embd_head, model_.k_rotation);
    }
}

void fused_step::write_cell(const layer & l, const request_cache & cache, const private_arrays & own, const float * qkv,
                            int64_t head, int64_t token) const {
    const fused_model & m    = model_;
    const int64_t       cell = cache.cell(token);
    const float *       k    = qkv + q_size_ + head * m.n_embd_head;
    const float *       v    = k + m.n_head_kv * m.n_embd_head;
    float *             row  = own.vector;
    const auto          at   = [&](const head_cache & all) {
        return const_cast<uint8_t *>(cache.stream(all, token).data) + head * all.head + cell * all.cell;
    };

    std::copy(k, k + m.n_embd_head, row);
    ready_for_scores(l, row, 1);
    ops_.store(row, m.n_embd_head, l.k.type, at(l.k));

    std::copy(v, v + m.n_embd_head, row);
    if (m.v_rotation) {
        ops_.hadamard(row, m.n_embd_head, m.v_rotation);
    }
    ops_.store(row, m.n_embd_head, l.v.type, at(l.v));
}

// The normed state of a token whose output is wanted: the result, or input of the output matrix.
void fused_step::finish(const float * x, float * vector, const input_rows & input, int64_t token, float * out) const {
    const auto * weight = static_cast<const float *>(model_.output_norm->data);
    ops_.rms_norm(x, weight, model_.n_embd, model_.eps, output_.data ? vector : out);
    if (output_.data) {
        give(input, model_.n_embd, token, 0, vector, model_.n_embd);
    }
}

// This thread's rows of the logits of all outputs.
void fused_step::project_output(const input_rows & input, float * out, int ith, int nth) const {
    const range groups = share(output_.n_groups(), ith, nth);
    matmul(output_, groups, input, model_.n_outputs, out + groups.begin * GROUP, output_.n_rows, nullptr, nullptr);
}

// One token's attention of all heads, for the output projection.
void fused_step::give_heads(float * heads, const input_rows & rows, int64_t token) const {
    if (model_.v_rotation) {
        ops_.hadamard(heads, q_size_, model_.v_rotation);
    }
    give(rows, q_size_, token, 0, heads, q_size_);
}

// hidden = silu(gate) up for some blocks of its columns; `next` is what this thread reads then.
void fused_step::feed_forward(const layer & l, const layer * later, const private_arrays & own, int64_t n_tokens,
                              range blocks, const input_rows & hidden, const uint8_t * next) const {
    static_assert(GROUP == BLOCK, "a group of rows makes a block of columns");
    const int64_t step    = std::max(slice_floats / (n_tokens * BLOCK), int64_t(1));
    float * const up_thin = own.thin + n_tokens * thin_size_;
    reduce(l.gate, own.input, n_tokens, own.thin);
    reduce(l.up, own.input, n_tokens, up_thin);
    for (int64_t b0 = blocks.begin; b0 < blocks.end; b0 += step) {
        const int64_t b1 = std::min(b0 + step, blocks.end);
        const int64_t n  = (b1 - b0) * BLOCK;
        multiply(l.gate, { b0, b1 }, own.input, n_tokens, own.thin, own.gate, n, at(l.up, b0),
                 later ? later->gate.data : nullptr);
        multiply(l.up, { b0, b1 }, own.input, n_tokens, up_thin, own.up, n, b1 < blocks.end ? at(l.gate, b1) : next,
                 later ? later->up.data : nullptr);
        ops_.silu_mul(own.gate, own.up, n_tokens * n, own.vector);
        for (int64_t t = 0; t < n_tokens; ++t) {
            give(hidden, model_.n_ff, t, b0 * BLOCK, own.vector + t * n, n);
        }
    }
}

namespace {

fused_step * create(const fused_model & model) {
    try {
        return fused_step::knows(model) ? new fused_step(model) : nullptr;
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

void destroy(fused_step * step) {
    delete step;
}

void plan(fused_step * step, ggml_tensor * node) {
    ggml_custom_op_params params;
    std::memcpy(&params, node->op_params, sizeof(params));
    params.n_tasks = step->n_threads();
    std::memcpy(node->op_params, &params, sizeof(params));
}

void run(ggml_tensor * dst, int ith, int nth, void * step) {
    static_cast<fused_step *>(step)->run(dst, ith, nth);
}

int64_t n_runs() {
    return own_runs;
}

}  // namespace

}  // namespace mobilellm

void * mobilellm_proc_address(const char * name) {
    static mobilellm::fused_interface fused = { mobilellm::create, mobilellm::destroy,       mobilellm::plan,
                                                mobilellm::run,    mobilellm::low_rank_size, mobilellm::pack_low_rank,
                                                mobilellm::n_runs, mobilellm::packed };
    const bool                        wanted =
        std::strcmp(name, "mobilellm_fused") == 0 && mobilellm_kernels_wanted() == mobilellm_kernels::all;
    return wanted ? &fused : nullptr;
}
