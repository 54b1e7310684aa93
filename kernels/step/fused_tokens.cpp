// A step of many tokens, in chunks: a chunk goes through attention and feed-forward of one block and q, k and v of the
// next on one thread, whichever takes it up first. Then all meet, since later tokens need the keys of earlier ones.

#include "fused_step.h"

#include <algorithm>
#include <cstring>

namespace mobilellm {

void fused_step::share_tokens(const fused_request & r, int ith, int nth) {
    const fused_model &    m   = model_;
    const private_arrays & own = private_[ith];

    if (ith == 0) {
        divide(r, nth);
        for (std::atomic<int> & taken : taken_) {
            taken.store(0, std::memory_order_relaxed);
        }
    }
    barrier_.wait(nth);

    const int64_t n_chunks = int64_t(chunks_.size());
    const size_t  n_layer  = layers_.size();
    for (size_t il = 0; il <= n_layer; ++il) {
        // the last chunks first: they see the most cells
        for (int64_t i; (i = taken_[il].fetch_add(1, std::memory_order_relaxed)) < n_chunks;) {
            const int64_t   chunk  = n_chunks - 1 - i;
            const range     tokens = chunks_[chunk];
            const int32_t * first  = std::lower_bound(r.outputs, r.outputs + m.n_outputs, int32_t(tokens.begin));
            const int32_t * last   = std::lower_bound(first, r.outputs + m.n_outputs, int32_t(tokens.end));

            if (il == 0) {
                prepare(r, chunk, tokens);
            } else if (il < n_layer) {
                finish_layer(layers_[il - 1], r, own, chunk, tokens.begin, tokens);
            } else if (first < last) {  // what nobody wants ends with its K and V
                finish_layer(layers_[il - 1], r, own, chunk, tokens.begin, { *first, last[-1] + 1 });
            }
            if (il < n_layer) {
                begin_layer(layers_[il], r, own, tokens);
                continue;
            }
            for (const int32_t * output = first; output < last; ++output) {
                const int64_t o = output - r.outputs;
                finish(x_ + *output * m.n_embd, own.vector, last_, o, r.out + o * m.n_embd);
            }
        }
        barrier_.wait(nth);
    }
    if (output_.data) {
        project_output(last_, r.out, ith, nth);
    }
}

// As many chunks for each thread, none with tokens of two sequences, whose cells would only be in each other's way.
void fused_step::divide(const fused_request & r, int nth) {
    const fused_model & m      = model_;
    const int64_t       rounds = (m.n_tokens + tile_tokens * nth - 1) / (tile_tokens * nth);
    const int64_t       most   = (m.n_tokens + rounds * nth - 1) / (rounds * nth);  // tokens of a chunk

    chunks_.clear();
    for (int64_t first = 0, last; first < m.n_tokens; first = last) {
        for (last = first + 1; last < m.n_tokens && r.sequences[last] == r.sequences[first]; ++last) {
        }
        const int64_t n = (last - first + most - 1) / most;
        if (int64_t(chunks_.size()) + n > n_lists_) {  // sequences that alternate: never ours
            chunks_.clear();
            for (int64_t i = 0; i < std::min(rounds * nth, m.n_tokens); ++i) {
                chunks_.push_back(share(m.n_tokens, i, std::min(rounds * nth, m.n_tokens)));
            }
            return;
        }
        for (int64_t i = 0; i < n; ++i) {
            const range part = share(last - first, i, n);
            chunks_.push_back({ first + part.begin, first + part.end });
        }
    }
}

void fused_step::prepare(const fused_request & r, int64_t chunk, range tokens) {
    const fused_model & m = model_;

    std::copy(r.embd + tokens.begin * m.n_embd, r.embd + tokens.end * m.n_embd, x_ + tokens.begin * m.n_embd);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        rope_angles(r.positions[t], rope_ + t * m.n_embd_head);
    }
    for (size_t c = 0; c < m.caches.size(); ++c) {
        const int64_t n_kv  = m.caches[c].n_kv;
        int32_t *     cells = lists_[c].cells + chunk * n_kv;
        uint64_t *    seen  = lists_[c].seen + chunk * n_kv;
        std::fill(seen, seen + n_kv, 0);
        for (int64_t t = tokens.begin; t < tokens.end; ++t) {
            for (int64_t cell = 0; cell < n_kv; ++cell) {
                seen[cell] |= uint64_t(r.caches[c].sees(t, cell)) << (t - tokens.begin);
            }
        }
        int64_t n = 0;
        for (int64_t cell = 0; cell < n_kv; ++cell) {
            if (seen[cell]) {
                seen[n]    = seen[cell];
                cells[n++] = int32_t(cell);
            }
        }
        r.caches[c].sort(tokens.begin, cells, n, seen);
        lists_[c].n_cells[chunk] = n;
    }
}

// Up to q and what the cache keeps of k and v.
void fused_step::begin_layer(const layer & l, const fused_request & r, const private_arrays & own, range tokens) {
    const fused_model & m   = model_;
    float *             qkv = qkv_ + tokens.begin * qkv_size_;

    normalize(own, x_ + tokens.begin * m.n_embd, tokens.size(), l.attn_norm);
    project_qkv(l, nullptr, own, tokens.size(), rope_ + tokens.begin * m.n_embd_head, qkv, 0, 1);
    for (int64_t t = tokens.begin; t < tokens.end; ++t, qkv += qkv_size_) {
        for (int64_t head = 0; head < m.n_head_kv; ++head) {
            write_cell(l, r.caches[l.cache], own, qkv, head, t);
        }
        ready_for_scores(l, qkv, m.n_head);
        for (int64_t i = 0; i < q_size_; ++i) {
            qkv[i] *= m.kq_scale;
        }
    }
}

// Of some tokens of a chunk that begins with token `first`.
void fused_step::finish_layer(const layer & l, const fused_request & r, const private_arrays & own, int64_t chunk,
                              int64_t first, range tokens) {
    const fused_model &   m     = model_;
    const seen_cells &    list  = lists_[l.cache];
    const request_cache & cache = r.caches[l.cache];
    const int64_t         n     = tokens.size();
    float *               x     = x_ + tokens.begin * m.n_embd;

    for (int64_t head = 0; head < m.n_head_kv; ++head) {
        const int64_t  at = head * n_group_ * m.n_embd_head;
        attention_tile a  = { m.n_embd_head,
                              int(n_group_),
                              n,
                              qkv_ + tokens.begin * qkv_size_ + at,
                              qkv_size_,
                              cache.stream(l.k, first),
                              cache.stream(l.v, first),
                              list.cells + chunk * cache.n_kv,
                              cache.positions(first),
                              list.seen + chunk * cache.n_kv,
                              tokens.begin - first,
                              list.n_cells[chunk],
                              own.tile,
                              own.rows + at,
                              q_size_ };
        a.k.data += head * l.k.head;
        a.v.data += head * l.v.head;
        ops_.attend_tile(a);
    }
    for (int64_t t = 0; t < n; ++t) {
        give_heads(own.rows + t * q_size_, own.input, t);
    }
    reduce(l.wo, own.input, n, own.thin);
    multiply(l.wo, { 0, l.wo.n_groups() }, own.input, n, own.thin, own.rows, m.n_embd, l.gate.data, nullptr);
    ops_.add(x, own.rows, n * m.n_embd);

    normalize(own, x, n, l.ffn_norm);
    feed_forward(l, nullptr, own, n, { 0, m.n_ff / BLOCK }, own.hidden, l.down.data);
    reduce(l.down, own.hidden, n, own.thin);
    multiply(l.down, { 0, l.down.n_groups() }, own.hidden, n, own.thin, own.rows, m.n_embd, nullptr, nullptr);
    ops_.add(x, own.rows, n * m.n_embd);
    control(l, x, n);
}

}  // namespace mobilellm
