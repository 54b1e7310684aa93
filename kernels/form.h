// The table of packed types: what a block of a row consists of. kernels.h draws how 32 of them lie side by side, and
// gguf_blocks.h knows where GGUF has each part. A new type of these parts is a line here and a line there.

#pragma once

#include "kernels.h"

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace mobilellm {

// A weight is scale · (quant - offset), plus a minimum where a row has two halves. Scale and minimum are halves, times
// smaller scales of their own where there are subs.
struct form {
    int  columns;  // of a block; 0: the type is not packed
    int  halves;   // fp16 numbers
    int  subs;     // bytes that hold smaller scales, and then minima, which are taken off
    int  scaled;   // columns that share a scale, 32 at most
    int  bits;     // of a quant
    int  offset;   // with a table that of its unsigned values, with 8 bits that of quants without sign
    bool table;    // the quant is the number of one of IQ4_NL's values
};

// static, also below: files with instruction-set flags of their own have a copy each
static constexpr form form_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q2_0:
            return { 64, 1, 0, 32, 2, 1, false };
        case GGML_TYPE_Q4_0:
            return { 32, 1, 0, 32, 4, 8, false };
        case GGML_TYPE_Q8_0:
            return { 32, 1, 0, 32, 8, 128, false };
        case GGML_TYPE_Q4_1:
            return { 32, 2, 0, 32, 4, 0, false };
        case GGML_TYPE_Q5_0:
            return { 32, 1, 0, 32, 5, 16, false };
        case GGML_TYPE_Q5_1:
            return { 32, 2, 0, 32, 5, 0, false };
        case GGML_TYPE_IQ4_NL:
            return { 32, 1, 0, 32, 4, 128, true };
        case GGML_TYPE_IQ4_XS:
            return { 256, 1, 6, 32, 4, 128, true };
        case GGML_TYPE_Q3_K:
            return { 256, 1, 12, 16, 3, 4, false };
        case GGML_TYPE_Q4_K:
            return { 256, 2, 12, 32, 4, 0, false };
        case GGML_TYPE_Q5_K:
            return { 256, 2, 12, 32, 5, 0, false };
        case GGML_TYPE_Q6_K:
            return { 256, 1, 16, 16, 6, 32, false };
        default:
            return {};
    }
}

namespace {

// Calls f with a packed type as a constant: decltype(argument)::value.
template <class F>
void with_type(ggml_type type, F f) {
#define MOBILELLM_CASE(TYPE) \
    case TYPE:               \
        return f(std::integral_constant<ggml_type, TYPE>())
    switch (type) {
        MOBILELLM_CASE(GGML_TYPE_Q2_0);
        MOBILELLM_CASE(GGML_TYPE_Q4_0);
        MOBILELLM_CASE(GGML_TYPE_Q8_0);
        MOBILELLM_CASE(GGML_TYPE_Q4_1);
        MOBILELLM_CASE(GGML_TYPE_Q5_0);
        MOBILELLM_CASE(GGML_TYPE_Q5_1);
        MOBILELLM_CASE(GGML_TYPE_IQ4_NL);
        MOBILELLM_CASE(GGML_TYPE_IQ4_XS);
        MOBILELLM_CASE(GGML_TYPE_Q3_K);
        MOBILELLM_CASE(GGML_TYPE_Q4_K);
        MOBILELLM_CASE(GGML_TYPE_Q5_K);
        MOBILELLM_CASE(GGML_TYPE_Q6_K);
        default:
            return;
    }
#undef MOBILELLM_CASE
}

}  // namespace

// Quants of 5 and 6 bits: a byte holds the low row's, and above it as many upper bits of the high row's as there is
// room for. The rest of the high row's lies in a chunk of rests, which stands before the chunks of bytes that it
// belongs to.
static constexpr bool has_rest(const form & f) {
    return f.bits == 5 || f.bits == 6;
}

static constexpr int rest_bits(const form & f) {
    return 2 * f.bits - 8;
}

static constexpr int chunk_of_rests(const form & f, int i) {
    return i * rest_bits(f) / 8 * (8 / rest_bits(f) + 1);
}

static constexpr int chunk_of_bytes(const form & f, int i) {
    return i + i * rest_bits(f) / 8 + 1;
}

// Columns whose quants lie together: a block, or 64 or 32 of its columns.
static constexpr int part_columns(const form & f) {
    return f.columns < 64 || has_rest(f) ? 32 : 64;
}

// Bytes of 32 rows: what stands before the quants, the quants of a part, and a block.
static constexpr int header_bytes(const form & f) {
    return 32 * (2 * f.halves + f.subs);
}

static constexpr int part_bytes(const form & f) {
    return part_columns(f) * 32 * f.bits / 8;
}

static constexpr int block_bytes(const form & f) {
    return f.columns ? header_bytes(f) + f.columns / part_columns(f) * part_bytes(f) : 0;
}

// The others lie in planes, of 1, 2, 4 and 8 bits: whether there is one, where in a part it begins, and which bit of
// the quant its first is.
static constexpr bool has_plane(const form & f, int bits) {
    return f.bits & bits && !has_rest(f);
}

static constexpr int plane_at(const form & f, int bits) {
    return (f.bits & (bits - 1)) * part_columns(f) * 32 / 8;
}

static constexpr int plane_bit(const form & f, int bits) {
    return f.bits & ~(2 * bits - 1);
}

// IQ4_NL's values plus 128.
constexpr uint8_t TABLE[16] = { 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241 };

namespace {

// By which bytes of two nibbles differ from what kernels.h draws.
template <ggml_type TYPE>
constexpr uint8_t high_sign() {
    return form_of(TYPE).bits == 4 && !form_of(TYPE).table ? HIGH_SIGN : 0;
}

// Byte `lane` of a chunk of a part.
template <ggml_type TYPE>
int chunk_byte(const uint8_t * part, int chunk, int lane) {
    return part[place_of(chunk, lane / 4, part_bytes(form_of(TYPE)) / 64) + lane % 4];
}

// Of a chunk of a plane.
template <ggml_type TYPE>
int plane_byte(const uint8_t * part, int bits, int chunk, int lane) {
    return chunk_byte<TYPE>(part, plane_at(form_of(TYPE), bits) / 64 + chunk, lane);
}

// The quant of a column of row r of a block; 8 bits without their sign.
template <ggml_type TYPE>
int quant_at(const uint8_t * block, int column, int r) {
    constexpr form  F     = form_of(TYPE);
    const uint8_t * part  = block + header_bytes(F) + column / part_columns(F) * part_bytes(F);
    const int       c     = column % part_columns(F);
    const int       lane  = 4 * (r % 16) + c % 4;
    const bool      high  = r >= 16;
    int             quant = 0;
    if constexpr (has_rest(F)) {
        constexpr int rest  = rest_bits(F);
        const int     both  = chunk_byte<TYPE>(part, chunk_of_bytes(F, c / 4), lane);
        const int     rests = chunk_byte<TYPE>(part, chunk_of_rests(F, c / 4), lane);
        const int     own   = rests >> c / 4 * rest % 8 & ((1 << rest) - 1);
        return high ? both >> F.bits << rest | own : both & ((1 << F.bits) - 1);
    }
    if (has_plane(F, 1)) {
        quant |= (plane_byte<TYPE>(part, 1, 2 * (c / 32) + high, lane) >> c % 32 / 4 & 1) << plane_bit(F, 1);
    }
    if (has_plane(F, 2)) {
        const int bit = c / 32 * 4 + high * 2;
        quant |= (plane_byte<TYPE>(part, 2, c % 32 / 4, lane) >> bit & 3) << plane_bit(F, 2);
    }
    if (has_plane(F, 4)) {
        const int both = plane_byte<TYPE>(part, 4, c / 4, lane) ^ high_sign<TYPE>();
        quant |= both >> 4 * high & 15;
    }
    if (has_plane(F, 8)) {
        quant = plane_byte<TYPE>(part, 8, c / 4 * 2 + high, lane);
    }
    return quant;
}

constexpr int MAX_SUBS = 16;  // smaller scales and minima of a row

// The smaller scales of the 32 rows of a block, and then their minima: number i of row r is at 32 i + r. `subs` are the
// header's bytes; `memory` holds 32 · MAX_SUBS.
template <ggml_type TYPE>
inline __attribute__((always_inline)) const int8_t * smaller_scales(const uint8_t * subs, int8_t * memory) {
    const auto each = [&](int to, auto value) {
        for (int r = 0; r < 32; ++r) {
            memory[32 * to + r] = int8_t(value(r));
        }
    };
    const auto byte = [&](int i, int r) { return subs[32 * i + r]; };
    if constexpr (TYPE == GGML_TYPE_Q6_K) {
        for (int i = 0; i < MAX_SUBS; ++i) {  // once, or a product would go back to them from among the quants
            each(i, [&](int r) { return byte(i, r); });
        }
    } else if constexpr (TYPE == GGML_TYPE_Q4_K || TYPE == GGML_TYPE_Q5_K) {
        for (int i = 0; i < 4; ++i) {
            each(i, [&](int r) { return byte(i, r) & 63; });
            each(4 + i, [&](int r) { return (byte(8 + i, r) & 15) | (byte(i, r) >> 6) << 4; });
            each(8 + i, [&](int r) { return byte(4 + i, r) & 63; });
            each(12 + i, [&](int r) { return byte(8 + i, r) >> 4 | (byte(4 + i, r) >> 6) << 4; });
        }
    } else if constexpr (TYPE == GGML_TYPE_Q3_K) {
        for (int i = 0; i < 4; ++i) {
            each(i, [&](int r) { return ((byte(i, r) & 15) | (byte(8 + i, r) & 3) << 4) - 32; });
            each(4 + i, [&](int r) { return ((byte(4 + i, r) & 15) | (byte(8 + i, r) >> 2 & 3) << 4) - 32; });
            each(8 + i, [&](int r) { return (byte(i, r) >> 4 | (byte(8 + i, r) >> 4 & 3) << 4) - 32; });
            each(12 + i, [&](int r) { return (byte(4 + i, r) >> 4 | (byte(8 + i, r) >> 6) << 4) - 32; });
        }
    } else if constexpr (TYPE == GGML_TYPE_IQ4_XS) {
        for (int i = 0; i < 2; ++i) {
            each(4 * i, [&](int r) { return ((byte(2 + 2 * i, r) & 15) | (byte(i, r) & 3) << 4) - 32; });
            each(4 * i + 1, [&](int r) { return (byte(2 + 2 * i, r) >> 4 | (byte(i, r) >> 2 & 3) << 4) - 32; });
            each(4 * i + 2, [&](int r) { return ((byte(3 + 2 * i, r) & 15) | (byte(i, r) >> 4 & 3) << 4) - 32; });
            each(4 * i + 3, [&](int r) { return (byte(3 + 2 * i, r) >> 4 | (byte(i, r) >> 6) << 4) - 32; });
        }
    }
    return memory;
}

}  // namespace

}  // namespace mobilellm
