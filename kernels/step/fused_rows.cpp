// A step of few tokens. Between two barriers every thread computes its own rows of a matrix or its attention tasks;
// what is as small as a vector (residual, norm, quantization) every thread computes for itself, which costs less
// than a barrier.

#include "fused_step.h"
#include "processor.h"

#include <algorithm>
#include <cstring>

namespace mobilellm {

void fused_step::share_rows(const fused_request & r, int ith, int nth) {
    const fused_model &    m   = model_;
    const int64_t          n   = m.n_tokens;
    const private_arrays & own = private_[ith];

    if (ith == 0) {
        own_thread_limit().begin();
    }
    for (int64_t i = ith; i < n * int64_t(m.caches.size()); i += nth) {
        const int64_t         t      = i % n;
        const request_cache & cache  = r.caches[i / n];
        const int64_t         n_kv   = m.caches[i / n].n_kv;
        int32_t * const       list   = lists_[i / n].cells + t * n_kv;
        int64_t               n_seen = 0;
        for (int64_t cell = 0; cell < n_kv; ++cell) {
            if (cache.sees(t, cell)) {
                list[n_seen++] = int32_t(cell);
            }
        }
        cache.sort(t, list, n_seen);
        lists_[i / n].n_cells[t] = n_seen;
    }
    std::memcpy(own.x, r.embd, n * m.n_embd * sizeof(float));
    for (int64_t t = 0; t < n; ++t) {
        rope_angles(r.positions[t], own.rope + t * m.n_embd_head);
    }

    const range rows   = share(n_groups_of(m.n_embd), ith, nth);
    const range blocks = share(m.n_ff / BLOCK, ith, nth);
    const range heads  = share(n * m.n_head_kv, ith, nth);  // to write, where there are several tokens

    // What is brought to the cache early must not drive out what is there: a thread's share of a block and half as
    // much.
    const bool early = block_size_ / nth * 3 / 2 <= second_level_share(nth);

    double     waiting = 0.0;
    const auto meet    = [&] { barrier_.wait(nth, ith == 0 ? &waiting : nullptr); };

    for (const layer & l : layers_) {
        const layer * later = early ? l.later : nullptr;

        normalize(own, own.x, n, l.attn_norm);
        project_qkv(l, later, own, n, own.rope, qkv_, ith, nth);
        meet();

        if (n > 1) {
            for (int64_t i = heads.begin; i < heads.end; ++i) {
                const int64_t t = i / m.n_head_kv;
                write_cell(l, r.caches[l.cache], own, qkv_ + t * qkv_size_, i % m.n_head_kv, t);
            }
            meet();
        }
        attend(l, r, own, ith, nth);
        meet();

        for (int64_t t = 0; t < n; ++t) {
            const int64_t shards = t * max_shards;
            ops_.combine(out_ + shards * q_size_, largest_ + shards * m.n_head, sum_ + shards * m.n_head,
                         n_shards(l, t), q_size_, m.n_head, m.n_embd_head, own.vector);
            give_heads(own.vector, own.input, t);
        }
        reduce(l.wo, own.input, n, own.thin);
        multiply(l.wo, rows, own.input, n, own.thin, update_ + rows.begin * GROUP, m.n_embd, at(l.gate, blocks.begin),
                 later ? later->wo.data : nullptr);
        meet();

        ops_.add(own.x, update_, n * m.n_embd);
        normalize(own, own.x, n, l.ffn_norm);
        feed_forward(l, later, own, n, blocks, hidden_, at(l.down, rows.begin));
        meet();

        reduce(l.down, hidden_, n, own.thin);
        multiply(l.down, rows, hidden_, n, own.thin, update_ + rows.begin * GROUP, m.n_embd, nullptr,
                 later ? later->down.data : nullptr);
        meet();
        ops_.add(own.x, update_, n * m.n_embd);
        control(l, own.x, n);
    }
    // each thread multiplies all states by its part of the output matrix; where they are the result, one writes each
    const int64_t step = output_.data ? 1 : nth;
    for (int64_t i = output_.data ? 0 : ith; i < m.n_outputs; i += step) {
        finish(own.x + r.outputs[i] * m.n_embd, own.vector, own.input, i, r.out + i * m.n_embd);
    }
    if (output_.data) {
        project_output(own.input, r.out, ith, nth);
    }
    if (ith == 0) {
        own_thread_limit().end(nth, waiting);
    }
}

int fused_step::n_shards(const layer & l, int64_t token) const {
    const int64_t n_cells = lists_[l.cache].n_cells[token];
    return int(std::clamp<int64_t>((n_cells + shard_cells - 1) / shard_cells, 1, max_shards));
}

void fused_step::attend(const layer & l, const fused_request & r, const private_arrays & own, int ith, int nth) {
    const fused_model &   m     = model_;
    const request_cache & cache = r.caches[l.cache];

    int64_t n_tasks = 0;
    for (int64_t t = 0; t < m.n_tokens; ++t) {
        n_tasks += n_shards(l, t) * m.n_head_kv;
    }
    const range mine  = share(n_tasks, ith, nth);
    int64_t     first = 0;  // task of this token
    for (int64_t t = 0; t < m.n_tokens; first += n_shards(l, t) * m.n_head_kv, ++t) {
        const int64_t begin = std::max(mine.begin - first, int64_t(0));
        const int64_t end   = std::min(mine.end - first, n_shards(l, t) * m.n_head_kv);
        if (begin >= end) {
            continue;
        }
        const float *    qkv  = qkv_ + t * qkv_size_;
        const head_cache k    = cache.stream(l.k, t);
        const head_cache v    = cache.stream(l.v, t);
        const int32_t *  list = lists_[l.cache].cells + t * cache.n_kv;
        std::copy(qkv, qkv + q_size_, own.q);
        ready_for_scores(l, own.q, m.n_head);
        for (int64_t i = 0; i < q_size_; ++i) {
            own.q[i] *= m.kq_scale;
        }
        for (int64_t task = begin, n_heads; task < end; task += n_heads) {
            const int64_t shard = task / m.n_head_kv;
            const int64_t head  = task % m.n_head_kv;
            n_heads             = std::min(m.n_head_kv - head, end - task);

            const int64_t shards = n_shards(l, t);
            const range   cells  = share(lists_[l.cache].n_cells[t], shard, shards);
            const int64_t n_next =
                task + n_heads < end ? share(lists_[l.cache].n_cells[t], shard + 1, shards).size() : 0;
            const int64_t   q_head   = head * n_group_;
            const int64_t   slot     = (t * max_shards + shard) * m.n_head + q_head;
            // a token alone: whoever reads its cell writes it first
            const int32_t * own_cell = std::find(list + cells.begin, list + cells.end, int32_t(cache.cell(t)));
            for (int64_t h = head; m.n_tokens == 1 && own_cell != list + cells.end && h < head + n_heads; ++h) {
                write_cell(l, cache, own, qkv, h, t);
            }
            ops_.attend({ m.n_embd_head, int(head), int(n_heads), int(n_group_), own.q + q_head * m.n_embd_head, k, v,
                          list + cells.begin, cells.size(), task == begin, n_next, own.scores, own.cells,
                          out_ + slot * m.n_embd_head, largest_ + slot, sum_ + slot });
        }
    }
}

}  // namespace mobilellm
