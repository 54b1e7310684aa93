// What the vector kernels share: how groups and tokens are walked, and where to prefetch. Each instruction set
// brings `tile`, which multiplies one group with a few tokens from registers.
//
// Only for the files compiled with instruction-set flags of their own. They must not use inline functions of other
// headers: the linker keeps one copy of such a function for the whole library, perhaps the one with the flags.

#pragma once

#include "form.h"
#include "kernels.h"
#include "processor.h"

#include <cstdlib>

#define MOBILELLM_ALWAYS __attribute__((always_inline))
#define MOBILELLM_INLINE inline MOBILELLM_ALWAYS

namespace mobilellm {

namespace {

// Bytes of 64 columns of a group, in the long run.
template <ggml_type TYPE>
constexpr int64_t pair_bytes() {
    return 64 * block_bytes(form_of(TYPE)) / form_of(TYPE).columns;
}

// 32 rows × 32 columns that stand against a block of activations.
template <ggml_type TYPE>
struct square {
    // `block` holds pair `pair` of its 64 columns, or is the first of two of 32; `second`: which half of the pair.
    MOBILELLM_INLINE square(const uint8_t * block, const int8_t * smaller, int pair, bool second) :
        halves(block), smaller(smaller), quants(block + header_bytes(F)), first((2 * pair + second) * BLOCK) {
        if (F.columns > 32) {
            quants += (part_columns(F) == 64 ? pair : 2 * pair + second) * part_bytes(F);
            in_second = part_columns(F) == 64 && second;
        } else if (second) {
            halves += block_bytes(F);
            quants += block_bytes(F);
        }
    }

    // Where columns 4i to 4i + 3 lie.
    MOBILELLM_INLINE const uint8_t * bytes(int i) const { return quants + 64 * chunk_of_bytes(F, i); }

    MOBILELLM_INLINE const uint8_t * rests(int i) const { return quants + 64 * chunk_of_rests(F, i); }

    // Chunk i of a plane; the two chunks of a plane of 1 bit are one of each half of the rows.
    MOBILELLM_INLINE const uint8_t * chunk(int bits, int i) const {
        return quants + plane_at(F, bits) + 64 * i + (in_second && bits != 2 ? 32 * 4 * bits : 0);
    }

    // The smaller scales of column c, or the minima.
    MOBILELLM_INLINE const int8_t * smaller_of(int c, bool least) const {
        return smaller + 32 * (((least ? F.columns : 0) + first + c) / F.scaled);
    }

    static constexpr form F = form_of(TYPE);

    const uint8_t * halves;
    const int8_t *  smaller;
    const uint8_t * quants;
    int             first;              // column in the block
    bool            in_second = false;  // of the 64 columns whose quants lie together
};

// The group that a tile reads, and what is to be read after it.
struct part {
    const uint8_t *  data;
    int64_t          n_pairs;
    streaming::cache hint;
    int64_t          ahead;  // bytes between what is read and what is fetched; past the group that lies
    int64_t          skip;   // so many bytes further on
    int64_t          later;  // from here to the same place of another matrix, 0: none
};

template <int64_t BYTES, int LOCALITY>
MOBILELLM_INLINE void prefetch_lines(const uint8_t * data) {
    for (int64_t offset = 0; offset < BYTES; offset += 64) {
        __builtin_prefetch(data + offset, 0, LOCALITY);
    }
}

MOBILELLM_INLINE bool fetches(const part & p) {
    return p.hint != streaming::none || p.later;
}

// Prefetches what stands `ahead` of pair i, and the first quarter of the same pair of the later matrix.
template <ggml_type TYPE>
MOBILELLM_INLINE void prefetch(const part & p, int64_t i) {
    constexpr int64_t bytes = pair_bytes<TYPE>();
    const int64_t     at    = i * bytes + p.ahead;
    const uint8_t *   pair  = p.data + at + (at < p.n_pairs * bytes ? 0 : p.skip);
    switch (p.hint) {
        case streaming::none:
            break;
        case streaming::nta:
            prefetch_lines<bytes, 0>(pair);
            break;
        case streaming::t2:
            prefetch_lines<bytes, 1>(pair);
            break;
        case streaming::t1:
            prefetch_lines<bytes, 2>(pair);
            break;
        case streaming::t0:
            prefetch_lines<bytes, 3>(pair);
            break;
    }
    if (p.later) {
        prefetch_lines<bytes / 4, 2>(p.data + p.later + i * bytes);
    }
}

// Calls f(square, block of activations) for the columns of a group, 32 at a time.
template <ggml_type TYPE, bool FETCH, class F>
MOBILELLM_INLINE void each_square(const part & p, const uint8_t * q, F f) {
    constexpr form FORM  = form_of(TYPE);
    constexpr int  PAIRS = FORM.columns > 64 ? FORM.columns / 64 : 1;  // of a block

    const uint8_t * block = p.data;
    const auto *    a     = reinterpret_cast<const activations *>(q);
    for (int64_t i = 0; i < p.n_pairs; i += PAIRS) {
        alignas(64) int8_t memory[32 * MAX_SUBS];
        const int8_t *     smaller = smaller_scales<TYPE>(block + 64 * FORM.halves, memory);
        for (int pair = 0; pair < PAIRS; ++pair, a += 2) {
            if (FETCH) {
                prefetch<TYPE>(p, i + pair);
            }
            f(square<TYPE>(block, smaller, pair, false), a);
            f(square<TYPE>(block, smaller, pair, true), a + 1);
        }
        block += PAIRS * pair_bytes<TYPE>();
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

// The activations of whole tiles of tokens in the order in which an instruction set likes to read them, once for all
// groups; none where it takes them as they are (ISA::ARRANGED, bytes of a block, is 0) or where memory is short.
template <class ISA>
struct arrangement {
    arrangement(const uint8_t * q, size_t q_size, int64_t n_tokens, int64_t n_pairs) :
        size(2 * n_pairs * ISA::ARRANGED) {
        const int64_t n = n_tokens / ISA::TILE;
        if (n > 0 && size > 0) {
            tiles = static_cast<uint8_t *>(std::malloc(n * size));
        }
        if constexpr (ISA::ARRANGED > 0) {
            for (int64_t i = 0; tiles && i < n; ++i) {
                ISA::arrange(q + i * ISA::TILE * q_size, q_size, 2 * n_pairs, tiles + i * size);
            }
        }
    }

    arrangement(const arrangement &) = delete;

    ~arrangement() { std::free(tiles); }

    int64_t   size;  // of a tile
    uint8_t * tiles = nullptr;
};

template <class ISA, ggml_type TYPE>
void multiply(const matrix & m, int64_t g0, int64_t g1, const activations * activation, int64_t n_tokens, float * y,
              int64_t stride, const void * next, const uint8_t * later) {
    const size_t  q_size  = activation_size(m.n_cols);
    const int64_t n_pairs = m.n_cols / 64;
    const int64_t size    = n_pairs * pair_bytes<TYPE>();  // of a group
    const auto *  q       = reinterpret_cast<const uint8_t *>(activation);

    // tokens that stay in the first-level cache while all groups pass, but two tiles at least
    int64_t chunk = first_level_cache() * 3 / 4 / int64_t(q_size) / ISA::TILE * ISA::TILE;
    chunk         = chunk < 2 * ISA::TILE ? 2 * ISA::TILE : chunk;

    for (int64_t t0 = 0; t0 < n_tokens; t0 += chunk) {
        const int64_t          t1 = t0 + chunk < n_tokens ? t0 + chunk : n_tokens;
        const arrangement<ISA> arranged(q + t0 * q_size, q_size, t1 - t0, n_pairs);
        for (int64_t g = g0; g < g1; ++g) {
            part p;
            p.data    = m.data + g * size;
            p.n_pairs = n_pairs;
            p.skip    = 0;
            p.later   = later ? later - m.data : 0;
            if (g + 1 == g1) {  // `next`, or once more what has just been read
                p.skip = (next ? static_cast<const uint8_t *>(next) : p.data) - (p.data + size);
            }
            const int64_t rows = m.n_rows - g * GROUP < GROUP ? m.n_rows - g * GROUP : GROUP;
            for (int64_t t = t0; t < t1; t += ISA::TILE) {
                const bool last = t + ISA::TILE >= t1;
                if (t == t0 && last) {
                    p.hint  = m.stream.hint;
                    p.ahead = (n_pairs < m.stream.ahead ? n_pairs : m.stream.ahead) * pair_bytes<TYPE>();
                } else {  // the last tile fetches the next group
                    p.hint  = last ? streaming::t1 : streaming::none;
                    p.ahead = size;
                }
                float * const to = y + t * stride + (g - g0) * GROUP;
                if constexpr (ISA::ARRANGED > 0) {
                    if (arranged.tiles && t + ISA::TILE <= t1) {
                        const uint8_t * tile = arranged.tiles + (t - t0) / ISA::TILE * arranged.size;
                        ISA::template arranged_tile<TYPE>(p, tile, to, stride, rows);
                        continue;
                    }
                }
                tiles<ISA, TYPE>(p, t1 - t < ISA::TILE ? t1 - t : ISA::TILE, q + t * q_size, q_size, to, stride, rows);
            }
        }
    }
}

template <class ISA>
void matmul(const matrix & m, int64_t g0, int64_t g1, const activations * q, int64_t n_tokens, float * y,
            int64_t stride, const void * next, const uint8_t * later) {
    with_type(m.type,
              [&](auto type) { multiply<ISA, decltype(type)::value>(m, g0, g1, q, n_tokens, y, stride, next, later); });
}

}  // namespace

}  // namespace mobilellm
