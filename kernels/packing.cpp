// GGUF rows <-> packed groups. The layout is drawn in kernels.h.

#include "form.h"
#include "gguf_blocks.h"
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef __SSE2__
#include "x86/interleave.h"
#endif

namespace mobilellm {

namespace {

size_t padded(size_t size) {
    return (size + 63) / 64 * 64;
}

#ifndef __SSE2__
// WORDS times four bytes of each of 16 rows, one chunk after the other.
template <int WORDS>
void interleave(const uint8_t * rows, size_t row_size, uint8_t * chunks) {
    for (int64_t r = 0; r < 16; ++r) {
        for (int i = 0; i < WORDS; ++i) {
            std::memcpy(chunks + 64 * i + 4 * r, rows + r * row_size + 4 * i, 4);
        }
    }
}
#endif

// The planes of a part of 32 rows, whose quants lie a byte each, rows `row_size` bytes apart.
template <ggml_type TYPE>
void pack_part(const uint8_t * rows, size_t row_size, uint8_t * out) {
    constexpr form F = form_of(TYPE);
    constexpr int  N = part_columns(F) / 4;  // chunks

    uint8_t low[64 * N];   // of rows 0 to 15
    uint8_t high[64 * N];  // of rows 16 to 31
    interleave<N>(rows, row_size, low);
    interleave<N>(rows + 16 * row_size, row_size, high);
    if constexpr (F.bits == 8) {
        for (int i = 0; i < N; ++i) {
            std::memcpy(out + 128 * i, low + 64 * i, 64);
            std::memcpy(out + 128 * i + 64, high + 64 * i, 64);
        }
    }
    if constexpr (has_rest(F)) {
        constexpr int rest = rest_bits(F);
        for (int i = 0; i < N; ++i) {
            uint8_t * both  = out + 64 * chunk_of_bytes(F, i);
            uint8_t * rests = out + 64 * chunk_of_rests(F, i);
            const int to    = i * rest % 8;
            for (int k = 64 * i; k < 64 * i + 64; ++k, ++both, ++rests) {
                *both  = uint8_t(low[k] | high[k] >> rest << F.bits);
                *rests = uint8_t((to ? *rests : 0) | (high[k] & ((1 << rest) - 1)) << to);
            }
        }
    }
    if constexpr (has_plane(F, 4)) {
        uint8_t * plane = out + plane_at(F, 4);
        for (int i = 0; i < 64 * N; ++i) {
            plane[i] = uint8_t((low[i] & 15) | high[i] << 4) ^ high_sign<TYPE>();
        }
    }
    if constexpr (has_plane(F, 2)) {
        constexpr int from   = plane_bit(F, 2);
        constexpr int second = 64 * N / 2;
        uint8_t *     plane  = out + plane_at(F, 2);
        for (int i = 0; i < second; ++i) {
            plane[i] = uint8_t((low[i] >> from & 3) | (high[i] >> from & 3) << 2 | (low[second + i] >> from & 3) << 4 |
                               (high[second + i] >> from & 3) << 6);
        }
    }
    if constexpr (has_plane(F, 1)) {
        constexpr int from = plane_bit(F, 1);
        for (int first = 0; first < N; first += 8) {
            uint8_t bits[128] = {};
            for (int i = 0; i < 8; ++i) {  // from above, by which shifts are by constants
                for (int k = 0; k < 64; ++k) {
                    bits[k]      = uint8_t(bits[k] >> 1 | (low[64 * (first + i) + k] >> from & 1) << 7);
                    bits[64 + k] = uint8_t(bits[64 + k] >> 1 | (high[64 * (first + i) + k] >> from & 1) << 7);
                }
            }
            std::memcpy(out + plane_at(F, 1) + 16 * first, bits, 128);
        }
    }
    if (QUARTERED) {  // place_of
        constexpr int n = part_bytes(F) / 64;
        uint8_t       chunks[part_bytes(F)];
        std::memcpy(chunks, out, sizeof(chunks));
        for (int i = 0; i < n; ++i) {
            for (int r = 0; r < 4; ++r) {
                std::memcpy(out + 16 * (n * r + i), chunks + 64 * i + 16 * r, 16);
            }
        }
    }
}

template <ggml_type TYPE>
void pack_groups(int64_t n_cols, int64_t n_rows, const uint8_t * rows, int64_t g0, int64_t g1, uint8_t * out) {
    constexpr form   F        = form_of(TYPE);
    constexpr stored S        = stored_of(TYPE);
    const int64_t    n_blocks = n_cols / F.columns;
    const size_t     row_size = n_blocks * S.bytes;

    uint8_t quants[GROUP * F.columns];
    std::memset(quants, 0, sizeof(quants));

    uint8_t * block = out + g0 * n_blocks * block_bytes(F);
    for (int64_t g = g0; g < g1; ++g) {
        const int64_t n = std::min(GROUP, n_rows - g * GROUP);
        for (int64_t b = 0; b < n_blocks; ++b, block += block_bytes(F)) {
            if (n < GROUP) {
                std::memset(block, 0, header_bytes(F));
                std::memset(quants + n * F.columns, 0, (GROUP - n) * F.columns);
            }
            for (int64_t r = 0; r < n; ++r) {
                const uint8_t * in = rows + (g * GROUP + r) * row_size + b * S.bytes;
#ifdef __GNUC__
                for (int line = 0; line < S.bytes; line += 64) {
                    __builtin_prefetch(in + GROUP * row_size + line);  // of the next group
                }
#endif
                for (int i = 0; i < F.halves; ++i) {
                    std::memcpy(block + 64 * i + 2 * r, in + S.halves + 2 * i, 2);
                }
                for (int i = 0; i < F.subs; ++i) {
                    block[64 * F.halves + 32 * i + r] = in[S.subs + i];
                }
                read_quants<TYPE>(in, quants + r * F.columns);
            }
            for (int c = 0; c < F.columns; c += part_columns(F)) {
                pack_part<TYPE>(quants + c, F.columns, block + header_bytes(F) + c / part_columns(F) * part_bytes(F));
            }
        }
    }
}

// Rows of floats: words of four bytes of 32 rows side by side, which are of one column or of two.
template <ggml_type TYPE>
void pack_floats(int64_t n_cols, int64_t n_rows, const uint8_t * rows, int64_t g0, int64_t g1, uint8_t * out) {
    constexpr int SIZE     = float_bytes(TYPE);
    constexpr int BYTES    = 64;  // of a row at a time
    const size_t  row_size = n_cols * SIZE;

    uint8_t part[GROUP * BYTES];
    uint8_t words[2][64 * BYTES / 4];  // of rows 0 to 15, and 16 to 31
    out += g0 * GROUP * row_size;
    for (int64_t g = g0; g < g1; ++g) {
        const int64_t n = std::min(GROUP, n_rows - g * GROUP);
        std::memset(part + n * BYTES, 0, (GROUP - n) * BYTES);
        for (size_t at = 0; at < row_size; at += BYTES, out += sizeof(words)) {
            for (int64_t r = 0; r < n; ++r) {
                const uint8_t * in = rows + (g * GROUP + r) * row_size + at;
#ifdef __GNUC__
                __builtin_prefetch(in + GROUP * row_size);  // of the next group
#endif
                std::memcpy(part + r * BYTES, in, BYTES);
            }
            for (int half = 0; half < 2; ++half) {
                interleave<BYTES / 4>(part + half * 16 * BYTES, BYTES, words[half]);
            }
            for (int i = 0; i < BYTES / 4; ++i) {
                uint8_t * to = out + 128 * i;
                if (TYPE != GGML_TYPE_F16) {
                    std::memcpy(to, words[0] + 64 * i, 64);
                    std::memcpy(to + 64, words[1] + 64 * i, 64);
                    continue;
                }
                uint16_t columns[2][GROUP];
                for (int r = 0; r < GROUP; ++r) {
                    uint32_t word;
                    std::memcpy(&word, words[r / 16] + 64 * i + 4 * (r % 16), sizeof(word));
                    columns[0][r] = uint16_t(word);
                    columns[1][r] = uint16_t(word >> 16);
                }
                std::memcpy(to, columns, sizeof(columns));
            }
        }
    }
}

// Where a float lies.
const uint8_t * float_at(const matrix & m, int64_t row, int64_t c) {
    const int64_t   r     = row % GROUP;
    const uint8_t * group = m.data + row / GROUP * group_size(m.type, m.n_cols);
    return group + (m.type == GGML_TYPE_BF16 ? 128 * (c / 2) + 4 * r + c % 2 * 2 : float_bytes(m.type) * (32 * c + r));
}

// Block b of a row as in GGUF.
template <ggml_type TYPE>
void unpack_block(const matrix & m, int64_t row, int64_t b, uint8_t * out) {
    constexpr form   F     = form_of(TYPE);
    constexpr stored S     = stored_of(TYPE);
    const uint8_t *  block = m.data + row / GROUP * group_size(m.type, m.n_cols) + b * block_bytes(F);
    const int64_t    r     = row % GROUP;

    std::memset(out, 0, S.bytes);
    for (int i = 0; i < F.halves; ++i) {
        std::memcpy(out + S.halves + 2 * i, block + 64 * i + 2 * r, 2);
    }
    for (int i = 0; i < F.subs; ++i) {
        out[S.subs + i] = block[64 * F.halves + 32 * i + r];
    }
    uint8_t quants[F.columns];
    for (int c = 0; c < F.columns; ++c) {
        quants[c] = uint8_t(quant_at<TYPE>(block, c, int(r)));
    }
    write_quants<TYPE>(quants, out);
}

}  // namespace

bool packable(ggml_type type, int64_t n_cols) {
    const form f = form_of(type);
    if (is_float(type)) {
        return n_cols > 0 && n_cols % 64 == 0;
    }
    return f.columns > 0 && n_cols > 0 && n_cols % std::max(f.columns, 64) == 0;
}

bool packs_floats(const char * name) {
    for (const char * plain : { "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight",
                                "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight" }) {
        const size_t n = std::strlen(name), size = std::strlen(plain);
        if (n > size && name[n - size - 1] == '.' && std::strcmp(name + n - size, plain) == 0) {
            return true;
        }
    }
    return std::strcmp(name, "token_embd.weight") == 0 || std::strcmp(name, "output.weight") == 0;
}

size_t group_size(ggml_type type, int64_t n_cols) {
    if (is_float(type)) {
        return GROUP * float_bytes(type) * n_cols;
    }
    const form f = form_of(type);
    return n_cols / f.columns * block_bytes(f);
}

size_t packed_size(ggml_type type, int64_t n_cols, int64_t n_rows) {
    return n_groups_of(n_rows) * group_size(type, n_cols);
}

size_t activation_size(int64_t n_cols) {
    return padded(n_cols / BLOCK * sizeof(activations));
}

void pack(ggml_type type, int64_t n_cols, int64_t n_rows, const void * data, int64_t g0, int64_t g1, uint8_t * out) {
    const auto * rows = static_cast<const uint8_t *>(data);
    if (type == GGML_TYPE_F16) {
        pack_floats<GGML_TYPE_F16>(n_cols, n_rows, rows, g0, g1, out);
    } else if (type == GGML_TYPE_BF16) {
        pack_floats<GGML_TYPE_BF16>(n_cols, n_rows, rows, g0, g1, out);
    } else if (type == GGML_TYPE_F32) {
        pack_floats<GGML_TYPE_F32>(n_cols, n_rows, rows, g0, g1, out);
    }
    with_type(type, [&](auto t) { pack_groups<decltype(t)::value>(n_cols, n_rows, rows, g0, g1, out); });
}

void unpack(const matrix & m, int64_t row, void * out) {
    for (int64_t c = 0; is_float(m.type) && c < m.n_cols; ++c) {
        const int size = float_bytes(m.type);
        std::memcpy(static_cast<uint8_t *>(out) + size * c, float_at(m, row, c), size);
    }
    with_type(m.type, [&](auto t) {
        constexpr ggml_type TYPE = decltype(t)::value;
        for (int64_t b = 0; b < m.n_cols / form_of(TYPE).columns; ++b) {
            unpack_block<TYPE>(m, row, b, static_cast<uint8_t *>(out) + b * stored_of(TYPE).bytes);
        }
    });
}

void unpack_row(const matrix & m, int64_t row, float * out) {
    const auto to_float = ggml_get_type_traits(m.type)->to_float;
    if (is_float(m.type)) {
        std::vector<uint8_t> data(m.n_cols * float_bytes(m.type));
        unpack(m, row, data.data());
        if (m.type == GGML_TYPE_F32) {
            std::memcpy(out, data.data(), data.size());
        } else {
            to_float(data.data(), out, m.n_cols);
        }
    }
    with_type(m.type, [&](auto t) {
        constexpr ggml_type TYPE    = decltype(t)::value;
        constexpr int       columns = form_of(TYPE).columns;
        for (int64_t b = 0; b < m.n_cols / columns; ++b) {
            alignas(8) uint8_t block[stored_of(TYPE).bytes];
            unpack_block<TYPE>(m, row, b, block);
            to_float(block, out + b * columns, columns);
        }
    });
}

}  // namespace mobilellm
