// GGUF rows <-> packed groups. The layout is drawn in kernels.h.

#include "kernels.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include "x86/interleave.h"
#endif

namespace mobilellm {

namespace {

// How one block of a row looks in GGUF: an fp16 scale, then the quants.
struct format {
    int64_t columns;
    int64_t words;  // of 4 bytes

    int64_t bytes() const { return 2 + 4 * words; }

    int64_t packed() const { return GROUP * bytes(); }  // of a group
};

format format_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return { 32, 4 };
        case GGML_TYPE_Q8_0:
            return { 32, 8 };
        case GGML_TYPE_Q2_0:
            return { 64, 4 };
        default:
            return { 0, 0 };
    }
}

size_t padded(size_t size) {
    return (size + 63) / 64 * 64;
}

// 4 × 4 bit pairs, transposed: pair c of byte k goes to pair k of byte c. Its own inverse.
uint32_t transposed(uint32_t x) {
    uint32_t t = (x ^ (x >> 6)) & 0x00CC00CC;
    x ^= t ^ (t << 6);
    t = (x ^ (x >> 12)) & 0x0000F0F0;
    return x ^ t ^ (t << 12);
}

// The quants of a Q2_0 block: GGUF has columns 4k .. 4k+3 in byte k, put in order they are 16j + k for j = 0 .. 3. Seen
// as 16 × 4 pairs of bits, that is GGUF's row 4j + m, pair c, to byte 4m + c, pair j.
void in_order_q2_0(const uint8_t * in, uint8_t * out) {
    for (int m = 0; m < 4; ++m) {
        const uint32_t x = in[m] | in[4 + m] << 8 | in[8 + m] << 16 | uint32_t(in[12 + m]) << 24;
        const uint32_t y = transposed(x);
        std::memcpy(out + 4 * m, &y, 4);
    }
}

void as_gguf_q2_0(const uint8_t * in, uint8_t * out) {
    for (int m = 0; m < 4; ++m) {
        uint32_t y;
        std::memcpy(&y, in + 4 * m, 4);
        const uint32_t x = transposed(y);
        for (int j = 0; j < 4; ++j) {
            out[4 * j + m] = uint8_t(x >> (8 * j));
        }
    }
}

// Where two rows share bytes: the bits of columns 0 to 15 in a byte of a block in GGUF's order (Q2_0: put in order,
// and 32 to 47), and how far from them those of the 16 columns after.
struct halves {
    uint8_t mask;
    int     shift;
    uint8_t sign;  // by which packed bytes differ
};

constexpr halves halves_of(ggml_type type) {
    return type == GGML_TYPE_Q4_0 ? halves{ 0x0F, 4, HIGH_SIGN } : halves{ 0x33, 2, 0 };
}

#ifndef __SSE2__
// Four bytes of each of 16 rows, chunk by chunk, STEP chunks apart.
template <int WORDS, int STEP>
void interleave(const uint8_t * rows, size_t row_size, uint8_t * quants) {
    for (int64_t r = 0; r < 16; ++r) {
        for (int i = 0; i < WORDS; ++i) {
            std::memcpy(quants + 64 * STEP * i + 4 * r, rows + r * row_size + 4 * i, 4);
        }
    }
}
#endif

// One block of 32 rows.
template <ggml_type TYPE>
void pack_block(const uint8_t * rows, size_t row_size, uint8_t * quants) {
    if (TYPE == GGML_TYPE_Q8_0) {
        interleave<8, 2>(rows, row_size, quants);
        interleave<8, 2>(rows + 16 * row_size, row_size, quants + 64);
        return;
    }
    constexpr halves  h    = halves_of(TYPE);
    constexpr uint8_t high = uint8_t(~h.mask);
    uint8_t           other[4 * 64];
    interleave<4, 1>(rows, row_size, quants);
    interleave<4, 1>(rows + 16 * row_size, row_size, other);
    for (int64_t i = 0; i < 4 * 64; ++i) {
        const uint8_t a = quants[i];
        const uint8_t b = other[i];
        quants[i]       = uint8_t((a & h.mask) | (b & h.mask) << h.shift) ^ h.sign;
        quants[256 + i] = uint8_t((a >> h.shift & h.mask) | (b & high)) ^ h.sign;
    }
}

// A constant number of words: loading a model is mostly this loop.
template <ggml_type TYPE, int WORDS>
void pack_groups(int64_t n_cols, int64_t n_rows, const uint8_t * rows, int64_t g0, int64_t g1, uint8_t * out) {
    constexpr int64_t bytes    = 2 + 4 * WORDS;
    const int64_t     n_blocks = n_cols / format_of(TYPE).columns;
    const size_t      row_size = n_blocks * bytes;

    uint8_t * scales = out + g0 * n_blocks * GROUP * bytes;  // of a block, which go before its quants
    for (int64_t g = g0; g < g1; ++g) {
        const uint8_t * row = rows + g * GROUP * row_size;
        const int64_t   n   = std::min(GROUP, n_rows - g * GROUP);

        for (int64_t b = 0; b < n_blocks; ++b, scales += GROUP * bytes) {
            uint8_t * quants = scales + GROUP * 2;
            uint8_t   blocks[GROUP * 4 * WORDS];  // as they are packed, where that is not as they are stored
            for (int64_t r = 0; r < n; ++r) {
                const uint8_t * in = row + r * row_size + b * bytes;
#ifdef __GNUC__
                __builtin_prefetch(row + GROUP * row_size + (b * GROUP + r) * bytes);  // of the next group
#endif
                std::memcpy(scales + 2 * r, in, 2);
                if (TYPE == GGML_TYPE_Q2_0) {
                    in_order_q2_0(in + 2, blocks + 4 * WORDS * r);
                } else if (n < GROUP) {
                    std::memcpy(blocks + 4 * WORDS * r, in + 2, 4 * WORDS);
                }
            }
            if (n < GROUP) {
                std::memset(scales + 2 * n, 0, 2 * (GROUP - n));
                std::memset(blocks + 4 * WORDS * n, 0, 4 * WORDS * (GROUP - n));
            }
            if (TYPE == GGML_TYPE_Q2_0 || n < GROUP) {
                pack_block<TYPE>(blocks, 4 * WORDS, quants);
            } else {
                pack_block<TYPE>(row + b * bytes + 2, row_size, quants);
            }
        }
    }
}

// Block b of a row as in GGUF.
void unpack_block(const matrix & m, int64_t row, int64_t b, uint8_t * out) {
    const format    f      = format_of(m.type);
    const uint8_t * scales = m.data + row / GROUP * group_size(m.type, m.n_cols) + b * f.packed();
    const uint8_t * quants = scales + GROUP * 2;
    const int64_t   r      = row % GROUP;
    const bool      second = r >= 16;  // of two rows that share

    std::memcpy(out, scales + 2 * r, 2);
    uint8_t bytes[32];
    for (int64_t i = 0; i < 8; ++i) {
        const int64_t chunk = m.type == GGML_TYPE_Q8_0 ? 2 * i + second : i;
        std::memcpy(bytes + 4 * i, quants + 64 * chunk + 4 * (r % 16), 4);
    }
    if (m.type == GGML_TYPE_Q8_0) {
        std::memcpy(out + 2, bytes, 32);
        return;
    }
    const halves h = halves_of(m.type);
    for (int64_t i = 0; i < 16; ++i) {
        const int low  = bytes[i] ^ h.sign;
        const int high = bytes[16 + i] ^ h.sign;
        bytes[i]       = uint8_t(second ? (low >> h.shift & h.mask) | (high & ~h.mask)
                                        : (low & h.mask) | (high & h.mask) << h.shift);
    }
    if (m.type == GGML_TYPE_Q2_0) {
        as_gguf_q2_0(bytes, out + 2);
    } else {
        std::memcpy(out + 2, bytes, 16);
    }
}

}  // namespace

bool packable(ggml_type type, int64_t n_cols) {
    return format_of(type).columns > 0 && n_cols > 0 && n_cols % 64 == 0;
}

size_t group_size(ggml_type type, int64_t n_cols) {
    const format f = format_of(type);
    return n_cols / f.columns * f.packed();
}

size_t packed_size(ggml_type type, int64_t n_cols, int64_t n_rows) {
    return (n_rows + GROUP - 1) / GROUP * group_size(type, n_cols);
}

size_t activation_size(int64_t n_cols) {
    return padded(n_cols / BLOCK * sizeof(activations));
}

void pack(ggml_type type, int64_t n_cols, int64_t n_rows, const void * rows, int64_t g0, int64_t g1, uint8_t * out) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return pack_groups<GGML_TYPE_Q4_0, 4>(n_cols, n_rows, static_cast<const uint8_t *>(rows), g0, g1, out);
        case GGML_TYPE_Q8_0:
            return pack_groups<GGML_TYPE_Q8_0, 8>(n_cols, n_rows, static_cast<const uint8_t *>(rows), g0, g1, out);
        default:
            return pack_groups<GGML_TYPE_Q2_0, 4>(n_cols, n_rows, static_cast<const uint8_t *>(rows), g0, g1, out);
    }
}

void unpack(const matrix & m, int64_t row, void * out) {
    const format f = format_of(m.type);
    for (int64_t b = 0; b < m.n_cols / f.columns; ++b) {
        unpack_block(m, row, b, static_cast<uint8_t *>(out) + b * f.bytes());
    }
}

void unpack_row(const matrix & m, int64_t row, float * out) {
    const format f        = format_of(m.type);
    const auto   to_float = ggml_get_type_traits(m.type)->to_float;
    for (int64_t b = 0; b < m.n_cols / f.columns; ++b) {
        alignas(8) uint8_t block[34];
        unpack_block(m, row, b, block);
        to_float(block, out + b * f.columns, f.columns);
    }
}

}  // namespace mobilellm
