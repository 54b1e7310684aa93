// The step of fused.h. Between two barriers every thread computes its own rows or attention tasks; what is as
// small as a vector (residual, norm, quantization) every thread computes for itself, which costs less than a barrier.

#include "fused.h"

#include "barrier.h"
#include "fused_ops.h"
#include "kernels.h"
#include "packed_buffer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#ifdef __unix__
#include <unistd.h>
#endif

namespace mobilellm {

namespace {

constexpr int     max_threads    = 64;  // more would have too few rows each; the rest stays idle
constexpr int64_t shard_cells    = 32;  // at least, where there is more than one shard
constexpr size_t  cache_line     = 64;
constexpr int64_t groups_a_block = BLOCK / GROUP;
constexpr int64_t max_embd_head  = 256;

struct range {
    int64_t begin;
    int64_t end;
};

// What thread ith of nth does of n items.
range share(int64_t n, int ith, int nth) {
    return { n * ith / nth, n * (ith + 1) / nth };
}

// Bytes of this processor's second-level cache, 0 where nobody says.
int64_t second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
    static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return size;
#else
    return 0;
#endif
}

size_t size_of(const matrix & w) {
    return packed_size(w.type, w.n_cols, w.n_rows);
}

// Where a group of a matrix begins.
const uint8_t * at(const matrix & w, int64_t group) {
    return w.data + group * group_size(w.type, w.n_cols);
}

int64_t padded(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

// Arrays in one allocation, each on cache lines of its own; pages are not touched before they are used.
class arena {
  public:
    template <typename T>
    void add(T *& array, int64_t n) {
        arrays_.push_back({ reinterpret_cast<void **>(&array), size_ });
        size_ += padded(n * sizeof(T), cache_line);
    }

    void allocate() {
        memory_.reset(static_cast<uint8_t *>(::operator new(size_, std::align_val_t(cache_line))));
        for (const auto & [array, offset] : arrays_) {
            *array = memory_.get() + offset;
        }
    }

  private:
    struct free {
        void operator()(uint8_t * p) const { ::operator delete(p, std::align_val_t(cache_line)); }
    };

    std::vector<std::pair<void **, size_t>> arrays_;
    std::unique_ptr<uint8_t, free>          memory_;
    size_t                                  size_ = 0;
};

struct layer {
    const float * attn_norm;
    const float * ffn_norm;
    matrix        qkv[3];
    matrix        wo;
    matrix        gate;
    matrix        up;
    matrix        down;
    head_cache    k;  // of KV head 0
    head_cache    v;
    int64_t       k_head;  // bytes from one head to the next
    int64_t       v_head;
    bool          rope;
    bool          qk_norm;
    const layer * later;  // in whose turn the weights change, when those of this layer come from the cache
};

// What a thread keeps to itself.
struct private_arrays {
    float *       x;       // (n_embd) the residual stream
    float *       vector;  // (the longest row of any matrix)
    activations * input;   // of the next matrix
    float *       q;       // (n_head, n_embd_head)
    float *       scores;  // (n_head / n_head_kv, n_scores)
};

bool is_matrix(const ggml_tensor * t, int64_t n_cols, int64_t n_rows) {
    return packed(t) && t->ne[0] == n_cols && t->ne[1] == n_rows;
}

bool is_vector(const ggml_tensor * t, int64_t n) {
    return t->type == GGML_TYPE_F32 && t->ne[0] == n && ggml_nelements(t) == n && ggml_is_contiguous(t) && t->data;
}

bool is_cache_type(ggml_type type, bool transposed) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_F32 || (type == GGML_TYPE_Q8_0 && !transposed);
}

bool transposed(const ggml_tensor * v) {
    return v->nb[1] > v->nb[2];
}

}  // namespace

class fused_step {
  public:
    static bool knows(const fused_model & m);
    explicit fused_step(const fused_model & model);

    void run(ggml_tensor * dst, int ith, int nth);

  private:
    // the three parts of attention that other threads wait for
    void project_qkv(const layer & l, const layer * later, const activations * input, const float * rope, int ith,
                     int nth);
    void attend(const layer & l, const private_arrays & own, int64_t cell, int ith, int nth);
    void ready_for_scores(const layer & l, const float * heads, int64_t n, float * out) const;
    void write_cell(const layer & l, const private_arrays & own, int64_t head, int64_t cell);

    void list_cells(const ggml_tensor * mask);
    int  n_shards() const;
    void normalize(const private_arrays & own, const float * weight) const;

    const fused_model  model_;
    const kernels &    kernels_ = best();
    const fused_ops &  ops_     = best_fused_ops();
    std::vector<layer> layers_;
    int64_t            n_group_;
    int64_t            n_scores_;
    int64_t            block_size_;  // bytes of the matrices of the first block

    arena          arena_;
    barrier        barrier_;
    private_arrays private_[max_threads];

    // shared
    int32_t *     cells_;  // (n_kv) that the token may see, ascending
    int64_t       n_cells_ = 0;
    float *       qkv_;      // (n_head + 2 n_head_kv, n_embd_head)
    float *       out_;      // (max_shards, n_head, n_embd_head) attention by shard
    float *       largest_;  // (max_shards, n_head)
    float *       sum_;      // (max_shards, n_head)
    float *       update_;   // (n_embd) what attention or feed-forward adds to the residual stream
    float *       gate_;     // (n_ff)
    float *       up_;       // (n_ff)
    activations * hidden_;   // of down
};

bool fused_step::knows(const fused_model & m) {
    const int64_t q_size  = m.n_head * m.n_embd_head;
    const int64_t kv_size = m.n_head_kv * m.n_embd_head;

    bool yes = m.n_head % m.n_head_kv == 0 && m.n_embd_head % BLOCK == 0 && m.n_embd_head <= max_embd_head &&
               is_vector(m.output_norm, m.n_embd);
    for (const fused_layer & l : m.layers) {
        yes = yes && is_vector(l.attn_norm, m.n_embd) && is_vector(l.ffn_norm, m.n_embd);
        yes = yes && is_matrix(l.wq, m.n_embd, q_size) && is_matrix(l.wk, m.n_embd, kv_size) &&
              is_matrix(l.wv, m.n_embd, kv_size) && is_matrix(l.wo, q_size, m.n_embd);
        yes = yes && is_matrix(l.ffn_gate, m.n_embd, m.n_ff) && is_matrix(l.ffn_up, m.n_embd, m.n_ff) &&
              is_matrix(l.ffn_down, m.n_ff, m.n_embd);
        yes = yes && is_cache_type(l.k->type, false) && is_cache_type(l.v->type, transposed(l.v)) && l.k->data &&
              l.v->data;
    }
    return yes;
}

fused_step::fused_step(const fused_model & model) : model_(model) {
    const fused_model & m      = model_;
    const int64_t       q_size = m.n_head * m.n_embd_head;

    n_group_  = m.n_head / m.n_head_kv;
    n_scores_ = padded(std::max(shard_cells, (m.n_kv + max_shards - 1) / max_shards), 16);

    for (const fused_layer & l : m.layers) {
        const bool    columns = transposed(l.v);
        const int64_t v_cell  = columns ? l.v->nb[0] : l.v->nb[2];
        const int64_t v_elem  = columns ? l.v->nb[2] : 0;
        layers_.push_back({ static_cast<const float *>(l.attn_norm->data),
                            static_cast<const float *>(l.ffn_norm->data),
                            { as_matrix(l.wq), as_matrix(l.wk), as_matrix(l.wv) },
                            as_matrix(l.wo),
                            as_matrix(l.ffn_gate),
                            as_matrix(l.ffn_up),
                            as_matrix(l.ffn_down),
                            { static_cast<uint8_t *>(l.k->data), l.k->type, false, int64_t(l.k->nb[2]), 0 },
                            { static_cast<uint8_t *>(l.v->data), l.v->type, columns, v_cell, v_elem },
                            int64_t(l.k->nb[1]),
                            int64_t(l.v->nb[1]),
                            l.rope,
                            l.qk_norm,
                            nullptr });
    }
    for (size_t il = 1; il + 1 < layers_.size(); ++il) {
        const auto same = [&](size_t a, size_t b) { return layers_[a].wo.data == layers_[b].wo.data; };
        if (same(il - 1, il) && !same(il, il + 1)) {
            layers_[il].later = &layers_[il + 1];
        }
    }
    const layer & block = layers_.front();
    block_size_         = size_of(block.qkv[0]) + size_of(block.qkv[1]) + size_of(block.qkv[2]) + size_of(block.wo) +
                  size_of(block.gate) + size_of(block.up) + size_of(block.down);

    const int64_t longest = std::max({ m.n_embd, m.n_ff, q_size });
    for (private_arrays & own : private_) {
        arena_.add(own.x, m.n_embd);
        arena_.add(own.vector, longest);
        arena_.add(own.input, longest / BLOCK);
        arena_.add(own.q, q_size);
        arena_.add(own.scores, n_group_ * n_scores_);
    }
    arena_.add(cells_, m.n_kv);
    arena_.add(qkv_, (m.n_head + 2 * m.n_head_kv) * m.n_embd_head);
    arena_.add(out_, max_shards * q_size);
    arena_.add(largest_, max_shards * m.n_head);
    arena_.add(sum_, max_shards * m.n_head);
    arena_.add(update_, m.n_embd);
    arena_.add(gate_, m.n_ff);
    arena_.add(up_, m.n_ff);
    arena_.add(hidden_, m.n_ff / BLOCK);
    arena_.allocate();
}

void fused_step::run(ggml_tensor * dst, int ith, int nth) {
    const fused_model & m = model_;

    nth = std::min(nth, max_threads);
    if (ith >= nth) {
        return;
    }
    const private_arrays & own  = private_[ith];
    const int32_t          pos  = *static_cast<const int32_t *>(dst->src[1]->data);
    const int64_t          cell = *static_cast<const int64_t *>(dst->src[2]->data) % m.kv_size;

    if (ith == 0) {
        list_cells(dst->src[3]);
    }
    std::memcpy(own.x, dst->src[0]->data, m.n_embd * sizeof(float));

    // cos and sin of each pair, the angles multiplied up in float as ggml does
    float       rope[max_embd_head];
    const float ratio = std::pow(m.rope_freq_base, -2.0f / float(m.n_embd_head));
    float       theta = float(pos);
    for (int64_t i = 0; i < m.n_embd_head; i += 2) {
        rope[i]     = std::cos(theta * m.rope_freq_scale) * m.rope_attn_factor;
        rope[i + 1] = std::sin(theta * m.rope_freq_scale) * m.rope_attn_factor;
        theta *= ratio;
    }

    const range rows   = share((m.n_embd + GROUP - 1) / GROUP, ith, nth);
    const range blocks = share(m.n_ff / BLOCK, ith, nth);
    const range groups = { blocks.begin * groups_a_block, blocks.end * groups_a_block };

    // What is brought to the cache early must not drive out what is there: a thread's share of a block and half as
    // much.
    const bool early = block_size_ / nth * 3 / 2 <= second_level_cache();

    for (const layer & l : layers_) {
        const layer * later = early ? l.later : nullptr;

        normalize(own, l.attn_norm);
        project_qkv(l, later, own.input, rope, ith, nth);
        barrier_.wait(nth);

        attend(l, own, cell, ith, nth);
        barrier_.wait(nth);

        ops_.combine(out_, largest_, sum_, n_shards(), m.n_head * m.n_embd_head, m.n_head, m.n_embd_head, own.vector);
        if (m.v_rotation) {
            ops_.hadamard(own.vector, m.n_head * m.n_embd_head, m.v_rotation);
        }
        kernels_.quantize(own.vector, l.wo.n_cols, own.input);
        kernels_.matvec(l.wo, rows.begin, rows.end, 0, l.wo.n_blocks(), own.input, update_, at(l.gate, groups.begin),
                        later ? later->wo.data : nullptr);
        barrier_.wait(nth);

        ops_.add(own.x, update_, m.n_embd);
        normalize(own, l.ffn_norm);
        kernels_.matvec(l.gate, groups.begin, groups.end, 0, l.gate.n_blocks(), own.input, gate_,
                        at(l.up, groups.begin), later ? later->gate.data : nullptr);
        kernels_.matvec(l.up, groups.begin, groups.end, 0, l.up.n_blocks(), own.input, up_, at(l.down, rows.begin),
                        later ? later->up.data : nullptr);
        const int64_t first = blocks.begin * BLOCK;
        const int64_t n     = (blocks.end - blocks.begin) * BLOCK;
        ops_.silu_mul(gate_ + first, up_ + first, n, own.vector);
        kernels_.quantize(own.vector, n, hidden_ + blocks.begin);
        barrier_.wait(nth);

        kernels_.matvec(l.down, rows.begin, rows.end, 0, l.down.n_blocks(), hidden_, update_, nullptr,
                        later ? later->down.data : nullptr);
        barrier_.wait(nth);
        ops_.add(own.x, update_, m.n_embd);
    }
    if (ith == 0) {
        ops_.rms_norm(own.x, static_cast<const float *>(m.output_norm->data), m.n_embd, m.eps,
                      static_cast<float *>(dst->data));
    }
}

void fused_step::list_cells(const ggml_tensor * mask) {
    n_cells_ = 0;
    for (int64_t i = 0; i < model_.n_kv; ++i) {
        const bool seen = mask->type == GGML_TYPE_F16 ? static_cast<const ggml_fp16_t *>(mask->data)[i] == 0
                                                      : static_cast<const float *>(mask->data)[i] == 0.0f;
        if (seen) {
            cells_[n_cells_++] = int32_t(i);
        }
    }
}

int fused_step::n_shards() const {
    return int(std::clamp<int64_t>((n_cells_ + shard_cells - 1) / shard_cells, 1, max_shards));
}

void fused_step::normalize(const private_arrays & own, const float * weight) const {
    ops_.rms_norm(own.x, weight, model_.n_embd, model_.eps, own.vector);
    kernels_.quantize(own.vector, model_.n_embd, own.input);
}

void fused_step::project_qkv(const layer & l, const layer * later, const activations * input, const float * rope,
                             int ith, int nth) {
    const int64_t n_embd_head = model_.n_embd_head;

    const int64_t all  = l.qkv[0].n_groups() + l.qkv[1].n_groups() + l.qkv[2].n_groups();
    const range   mine = share(all, ith, nth);

    int64_t first = 0;  // group of this matrix
    for (const matrix & w : l.qkv) {
        const int64_t begin = std::max(mine.begin - first, int64_t(0));
        const int64_t end   = std::min(mine.end - first, w.n_groups());
        float *       y     = qkv_ + first * GROUP;
        if (begin < end) {
            const int       i    = int(&w - l.qkv);
            const uint8_t * next = i < 2 && end == w.n_groups() ? l.qkv[i + 1].data : nullptr;
            kernels_.matvec(w, begin, end, 0, w.n_blocks(), input, y, next, later ? later->qkv[i].data : nullptr);
            if (l.rope && i < 2) {
                for (int64_t i = begin * GROUP; i < end * GROUP; i += 2) {
                    const float cos = rope[i % n_embd_head];
                    const float sin = rope[i % n_embd_head + 1];
                    const float a   = y[i];
                    const float b   = y[i + 1];
                    y[i]            = a * cos - b * sin;
                    y[i + 1]        = a * sin + b * cos;
                }
            }
        }
        first += w.n_groups();
    }
}

// Heads of q or k as they are multiplied, and k as the cache holds it.
void fused_step::ready_for_scores(const layer & l, const float * heads, int64_t n, float * out) const {
    const int64_t n_embd_head = model_.n_embd_head;

    std::copy(heads, heads + n * n_embd_head, out);
    for (int64_t i = 0; l.qk_norm && i < n; ++i) {
        ops_.rms_norm(out + i * n_embd_head, nullptr, n_embd_head, model_.eps, out + i * n_embd_head);
    }
    if (model_.k_rotation) {
        ops_.hadamard(out, n * n_embd_head, model_.k_rotation);
    }
}

void fused_step::attend(const layer & l, const private_arrays & own, int64_t cell, int ith, int nth) {
    const fused_model & m      = model_;
    const int64_t       q_size = m.n_head * m.n_embd_head;

    ready_for_scores(l, qkv_, m.n_head, own.q);
    for (int64_t i = 0; i < q_size; ++i) {
        own.q[i] *= m.kq_scale;
    }
    const range tasks = share(n_shards() * m.n_head_kv, ith, nth);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        const int64_t   shard  = task / m.n_head_kv;
        const int64_t   head   = task % m.n_head_kv;
        const int64_t   q_head = head * n_group_;
        const range     cells  = share(n_cells_, int(shard), n_shards());
        const int32_t * begin  = cells_ + cells.begin;
        const int32_t * end    = cells_ + cells.end;
        const int64_t   at     = shard * m.n_head + q_head;

        attention_shard a = {
            m.n_embd_head, int(n_group_), own.q + q_head * m.n_embd_head, l.k,           l.v,      begin, end - begin,
            own.scores,    n_scores_,     out_ + at * m.n_embd_head,      largest_ + at, sum_ + at
        };
        a.k.data += head * l.k_head;
        a.v.data += head * l.v_head;
        if (std::binary_search(begin, end, int32_t(cell))) {  // whoever reads the token's own cell writes it first
            write_cell(l, own, head, cell);
        }
        ops_.attend(a);
    }
}

void fused_step::write_cell(const layer & l, const private_arrays & own, int64_t head, int64_t cell) {
    const fused_model & m   = model_;
    const float *       k   = qkv_ + (m.n_head + head) * m.n_embd_head;
    const float *       v   = k + m.n_head_kv * m.n_embd_head;
    float *             row = own.vector;

    ready_for_scores(l, k, 1, row);
    ops_.store(row, m.n_embd_head, l.k.type, const_cast<uint8_t *>(l.k.data) + head * l.k_head + cell * l.k.cell);

    std::copy(v, v + m.n_embd_head, row);
    if (m.v_rotation) {
        ops_.hadamard(row, m.n_embd_head, m.v_rotation);
    }
    uint8_t * out = const_cast<uint8_t *>(l.v.data) + head * l.v_head + cell * l.v.cell;
    if (!l.v.transposed) {
        ops_.store(row, m.n_embd_head, l.v.type, out);
        return;
    }
    uint8_t elements[max_embd_head * sizeof(float)];
    ops_.store(row, m.n_embd_head, l.v.type, elements);
    for (int64_t e = 0; e < m.n_embd_head; ++e) {
        std::memcpy(out + e * l.v.element, elements + e * l.v.cell, l.v.cell);
    }
}

namespace {

fused_step * create(const fused_model & model) {
    return fused_step::knows(model) ? new fused_step(model) : nullptr;
}

void destroy(fused_step * step) {
    delete step;
}

void run(ggml_tensor * dst, int ith, int nth, void * step) {
    static_cast<fused_step *>(step)->run(dst, ith, nth);
}

}  // namespace

}  // namespace mobilellm

void * mobilellm_proc_address(const char * name) {
    static mobilellm::fused_interface fused = { mobilellm::create, mobilellm::destroy, mobilellm::run };
    const bool                        wanted =
        std::strcmp(name, "mobilellm_fused") == 0 && mobilellm_kernels_wanted() == mobilellm_kernels::all;
    return wanted ? &fused : nullptr;
}
