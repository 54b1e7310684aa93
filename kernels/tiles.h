// What the vector kernels share: how groups and tokens are walked, and where to prefetch. Each instruction set
// brings `tile`, which multiplies one group with a few tokens from registers.
//
// Only for the files compiled with instruction-set flags of their own. They must not use inline functions of other
// headers: the linker keeps one copy of such a function for the whole library, perhaps the one with the flags.

#pragma once

#include "kernels.h"

#define MOBILELLM_INLINE inline __attribute__((always_inline))

namespace mobilellm {

namespace {

// How many bytes hold the quants of a pair of blocks (64 columns) of a group, and how many its scales.
template <ggml_type TYPE>
constexpr int64_t pair_bytes() {
    return TYPE == GGML_TYPE_Q4_0 ? 1024 : TYPE == GGML_TYPE_Q8_0 ? 2048 : 512;
}

template <ggml_type TYPE>
constexpr int64_t scale_bytes() {
    return TYPE == GGML_TYPE_Q2_0 ? 64 : 128;
}

// The group that a tile reads, and what is to be read after it.
struct part {
    const uint8_t *  scales;  // of its first pair of blocks
    const uint8_t *  quants;  // likewise
    int64_t          n_pairs;
    streaming::cache hint;
    const uint8_t *  next_scales;  // of the next group
    int64_t          ahead;        // bytes to prefetch ahead of quants; past the part they lie
    int64_t          skip;         // so many bytes further on
    int64_t          later;        // from here to the same place of another matrix, 0: none
};

// Prefetches a pair's quants from `quants` on and its scales; LOCALITY is that of __builtin_prefetch.
template <ggml_type TYPE, int LOCALITY>
MOBILELLM_INLINE void prefetch_pair(const uint8_t * quants, const uint8_t * scales) {
    for (int64_t offset = 0; offset < pair_bytes<TYPE>(); offset += 64) {
        __builtin_prefetch(quants + offset, 0, LOCALITY);
    }
    for (int64_t offset = 0; offset < scale_bytes<TYPE>(); offset += 64) {
        __builtin_prefetch(scales + offset, 0, LOCALITY);
    }
}

// Prefetches what stands `ahead` of pair i, and the first quarter of the same pair of the later matrix.
template <ggml_type TYPE>
MOBILELLM_INLINE void prefetch(const part & p, int64_t i) {
    constexpr int64_t bytes  = pair_bytes<TYPE>();
    const int64_t     at     = i * bytes + p.ahead;
    const uint8_t *   quants = p.quants + at + (at < p.n_pairs * bytes ? 0 : p.skip);
    const uint8_t *   scales = p.next_scales + i * scale_bytes<TYPE>();
    switch (p.hint) {
        case streaming::none:
            break;
        case streaming::nta:
            prefetch_pair<TYPE, 0>(quants, scales);
            break;
        case streaming::t2:
            prefetch_pair<TYPE, 1>(quants, scales);
            break;
        case streaming::t1:
            prefetch_pair<TYPE, 2>(quants, scales);
            break;
        case streaming::t0:
            prefetch_pair<TYPE, 3>(quants, scales);
            break;
    }
    if (p.later) {
        const uint8_t * there = p.quants + p.later + i * bytes;
        for (int64_t offset = 0; offset < bytes / 4; offset += 64) {
            __builtin_prefetch(there + offset, 0, 2);
        }
    }
}

// n tokens (1 to ISA::TILE) by the tile made for that number.
template <class ISA, ggml_type TYPE, int T = ISA::TILE>
MOBILELLM_INLINE void tiles(const part & p, int64_t n, const uint8_t * q, size_t q_size, float * y, int64_t stride,
                            int64_t rows) {
    if (n == T) {
        ISA::template tile<TYPE, T>(p, q, q_size, y, stride, rows);
    } else if constexpr (T > 1) {
        tiles<ISA, TYPE, T - 1>(p, n, q, q_size, y, stride, rows);
    }
}

template <class ISA, ggml_type TYPE>
void multiply(const matrix & m, int64_t g0, int64_t g1, const activations * activation, int64_t n_tokens, float * y,
              int64_t stride, const void * next, const uint8_t * later) {
    constexpr int64_t bytes = pair_bytes<TYPE>();

    const size_t  q_size      = activation_size(m.n_cols);
    const size_t  size        = group_size(m.type, m.n_cols);
    const size_t  scales_size = size - m.n_cols / 64 * bytes;
    const int64_t n_pairs     = m.n_cols / 64;
    const int64_t part_bytes  = n_pairs * bytes;
    const auto *  q           = reinterpret_cast<const uint8_t *>(activation);

    // tokens that stay in the first-level cache while all groups pass, but two tiles at least
    int64_t chunk = 24 * 1024 / int64_t(q_size) / ISA::TILE * ISA::TILE;
    chunk         = chunk < 2 * ISA::TILE ? 2 * ISA::TILE : chunk;

    for (int64_t t0 = 0; t0 < n_tokens; t0 += chunk) {
        const int64_t t1 = t0 + chunk < n_tokens ? t0 + chunk : n_tokens;
        for (int64_t g = g0; g < g1; ++g) {
            const uint8_t * group = m.data + g * size;
            const bool      last  = g + 1 == g1;

            part p;
            p.scales      = group;
            p.quants      = group + scales_size;
            p.n_pairs     = n_pairs;
            p.hint        = m.stream.hint;
            p.next_scales = last ? p.scales : p.scales + size;
            p.ahead       = part_bytes < m.stream.ahead ? part_bytes : m.stream.ahead;
            p.later       = later ? later - m.data : 0;
            p.skip        = last ? 0 : int64_t(size) - part_bytes;
            if (last) {  // `next`, or once more what has just been read
                const auto * follows = next ? static_cast<const uint8_t *>(next) : p.quants;
                p.skip               = follows - (p.quants + part_bytes);
            }
            const int64_t rows = m.n_rows - g * GROUP < GROUP ? m.n_rows - g * GROUP : GROUP;
            for (int64_t t = t0; t < t1; t += ISA::TILE) {
                tiles<ISA, TYPE>(p, t1 - t < ISA::TILE ? t1 - t : ISA::TILE, q + t * q_size, q_size,
                                 y + t * stride + (g - g0) * GROUP, stride, rows);
            }
        }
    }
}

template <class ISA>
void matmul(const matrix & m, int64_t g0, int64_t g1, const activations * q, int64_t n_tokens, float * y,
            int64_t stride, const void * next, const uint8_t * later) {
    switch (m.type) {
        case GGML_TYPE_Q4_0:
            return multiply<ISA, GGML_TYPE_Q4_0>(m, g0, g1, q, n_tokens, y, stride, next, later);
        case GGML_TYPE_Q8_0:
            return multiply<ISA, GGML_TYPE_Q8_0>(m, g0, g1, q, n_tokens, y, stride, next, later);
        default:
            return multiply<ISA, GGML_TYPE_Q2_0>(m, g0, g1, q, n_tokens, y, stride, next, later);
    }
}

}  // namespace

}  // namespace mobilellm
