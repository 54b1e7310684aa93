// A step of many tokens, in chunks: a chunk goes through attention and feed-forward of one block and q, k and v of the
// next on one thread, whichever takes it up first. Then all meet, since later tokens need the keys of earlier ones.
// Matrices are multiplied by all tokens of a chunk at once, whatever sequences they belong to; each sequence in it has
// its attention for itself.

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
            const chunk & part   = chunks_[n_chunks - 1 - i];
            const range   tokens = part.tokens;
            if (il < n_layer) {
                if (il == 0) {
                    prepare(r, part);
                } else {
                    finish_layer(layers_[il - 1], r, own, part, all_.data() + tokens.begin, tokens.size());
                }
                begin_layer(layers_[il], r, own, tokens);
                continue;
            }
            const int32_t * first = std::lower_bound(r.outputs, r.outputs + m.n_outputs, int32_t(tokens.begin));
            const int32_t * last  = std::lower_bound(first, r.outputs + m.n_outputs, int32_t(tokens.end));
            if (first < last) {  // what nobody wants ends with its K and V
                finish_layer(layers_[il - 1], r, own, part, first, last - first);
            }
            for (const int32_t * output = first; output < last; ++output) {
                const int64_t o = output - r.outputs;
                finish(x_ + (tokens.begin + (output - first)) * m.n_embd, own.vector, last_, o, r.out + o * m.n_embd);
            }
        }
        barrier_.wait(nth);
    }
    if (output_.data) {
        project_output(last_, r.out, ith, nth);
    }
}

// As many chunks for each thread, and their pieces: what a sequence sees would only be in the way of the others.
void fused_step::divide(const fused_request & r, int nth) {
    const int64_t n_tokens = model_.n_tokens;
    const int64_t rounds   = (n_tokens + tile_tokens * nth - 1) / (tile_tokens * nth);
    const int64_t n_chunks = std::min(rounds * nth, n_tokens);
    const auto    ends     = [&](int64_t t) { return r.sequences[t] != r.sequences[t - 1]; };

    int64_t most = n_chunks;  // pieces
    for (int64_t t = 1; t < n_tokens; ++t) {
        most += ends(t);
    }
    const bool apart = std::min(most, n_tokens) <= n_lists_;  // or sequences alternate, which ours never do

    chunks_.clear();
    pieces_.clear();
    for (int64_t i = 0; i < n_chunks; ++i) {
        const range tokens = share(n_tokens, i, n_chunks);
        chunks_.push_back({ tokens, { int64_t(pieces_.size()), 0 } });
        for (int64_t first = tokens.begin, last; first < tokens.end; first = last) {
            for (last = first + 1; last < tokens.end && !(apart && ends(last)); ++last) {
            }
            pieces_.push_back({ first, last });
        }
        chunks_.back().pieces.end = int64_t(pieces_.size());
    }
}

void fused_step::prepare(const fused_request & r, const chunk & part) {
    const fused_model & m      = model_;
    const range         tokens = part.tokens;

    std::copy(r.embd + tokens.begin * m.n_embd, r.embd + tokens.end * m.n_embd, x_ + tokens.begin * m.n_embd);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        rope_angles(r.positions[t], rope_ + t * m.n_embd_head);
    }
    for (size_t c = 0; c < m.caches.size(); ++c) {
        for (int64_t piece = part.pieces.begin; piece < part.pieces.end; ++piece) {
            list_cells(r.caches[c], lists_[c], piece);
        }
    }
}

void fused_step::list_cells(const request_cache & cache, const seen_cells & list, int64_t piece) const {
    const int64_t n_kv   = cache.n_kv;
    const range   tokens = pieces_[piece];
    int32_t *     cells  = list.cells + piece * n_kv;
    uint64_t *    seen   = list.seen + piece * n_kv;
    std::fill(seen, seen + n_kv, 0);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        for (int64_t cell = 0; cell < n_kv; ++cell) {
            seen[cell] |= uint64_t(cache.sees(t, cell)) << (t - tokens.begin);
        }
    }
    int64_t n = 0;
    for (int64_t cell = 0; cell < n_kv; ++cell) {
        if (seen[cell]) {
            seen[n]    = seen[cell];
            cells[n++] = int32_t(cell);
        }
    }
    cache.sort(tokens.begin, cells, n, seen);
    list.n_cells[piece] = n;
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

// Of n tokens of a chunk, ascending. Their residual streams are the chunk's first n rows then.
void fused_step::finish_layer(const layer & l, const fused_request & r, const private_arrays & own, const chunk & part,
                              const int32_t * tokens, int64_t n) {
    const fused_model & m     = model_;
    float *             x     = x_ + part.tokens.begin * m.n_embd;
    int64_t             piece = part.pieces.begin;

    for (int64_t i = 0, end; i < n; i = end) {
        for (; pieces_[piece].end <= tokens[i]; ++piece) {
        }
        for (end = i + 1; end < n && tokens[end] == tokens[end - 1] + 1 && tokens[end] < pieces_[piece].end; ++end) {
        }
        const range run = { tokens[i], tokens[i] + end - i };
        attend_piece(l, r.caches[l.cache], own, piece, run, own.rows + i * q_size_);
        if (run.begin > part.tokens.begin + i) {
            std::memmove(x + i * m.n_embd, x_ + run.begin * m.n_embd, run.size() * m.n_embd * sizeof(float));
        }
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

// Of some tokens of a piece.
void fused_step::attend_piece(const layer & l, const request_cache & cache, const private_arrays & own, int64_t piece,
                              range tokens, float * out) {
    const fused_model & m     = model_;
    const seen_cells &  list  = lists_[l.cache];
    const int64_t       first = pieces_[piece].begin;

    for (int64_t head = 0; head < m.n_head_kv; ++head) {
        const int64_t  at = head * n_group_ * m.n_embd_head;
        attention_tile a  = { m.n_embd_head,
                              int(n_group_),
                              tokens.size(),
                              qkv_ + tokens.begin * qkv_size_ + at,
                              qkv_size_,
                              cache.stream(l.k, first),
                              cache.stream(l.v, first),
                              list.cells + piece * cache.n_kv,
                              cache.positions(first),
                              list.seen + piece * cache.n_kv,
                              tokens.begin - first,
                              list.n_cells[piece],
                              own.tile,
                              out + at,
                              q_size_ };
        a.k.data += head * l.k.head;
        a.v.data += head * l.v.head;
        ops_.attend_tile(a);
    }
}

}  // namespace mobilellm
