// Packed weights and what multiplies them. One file per instruction set fills the table `kernels`; scalar/ is
// the truth: integer parts of the others are equal to its, float results to 1e-5 of the sum of magnitudes.
//
// A packed matrix is rows in groups of 32, so that one block of activations serves 16 rows from one register, and from
// another 16 more. The last group is filled up with zero rows. Groups follow each other, and in a group its blocks of
// columns: what a product reads is one stream of bytes from beginning to end, which processors fetch ahead by
// themselves. A block, of as many columns as in GGUF, is (form.h has how much of each for every type)
//
//     halves   32 fp16 each   scale of row r at 2 r; then likewise its minimum
//     subs     32 bytes each  the bytes of smaller scales, number i of row r at 32 i + r
//     quants                  for every 64 columns, or 32 where a block has no more or quants have 5 or 6 bits: planes
//                             of chunks of 64 bytes
//
//     plane    chunks, columns  byte 4 r + c of chunk i holds
//     1 bit    2 for 32         column 4j + c in bit j, of row r where i is even, of row 16 + r where it is odd
//     2 bits   8 for 64         column 4i + c of rows r and 16 + r in bits 0-1 and 2-3, 32 + 4i + c in 4-5 and 6-7
//     4 bits   8 for 32         column 4i + c of row r in its low nibble, of row 16 + r in its high nibble
//     8 bits   16 for 32        column 4 (i / 2) + c, of row r where i is even, of row 16 + r where it is odd
//
// So 4 bytes of a row always stand against 4 neighbouring activations, which is what dot-product instructions take.
// Quants of 3 bits lie in two planes; the one of fewer bits, which are the quant's high ones, comes first. Of 5 and 6
// bits only the high rows' are divided: byte 4 r + c of a chunk holds column 4i + c of row r, and above it what there
// is room for of row 16 + r, its upper 3 or 2 bits. Before each 4 or 2 of these chunks stands one with the lower 2 or 4
// bits, those of the first in its lowest. No byte is added to what GGUF has.
//
// Two rows that share bytes share their activations q too: where l is the low one and x = l + 16 h, the high
// one's Σ h q is (Σ x q - Σ l q) / 16, so that h need not be taken out of x. With 2 bits the factor is 4.
//
// Floats are packed, too: the 32 rows of a column side by side, one column after the other. Of BF16 two columns lie
// together, a word of 4 bytes for each row, because either half of it becomes a float32 by one instruction. Floats are
// multiplied by floats (fused_ops.h).
//
// ARM's registers hold 4 rows of a chunk: there all chunks of rows 4r .. 4r + 3 of 64 or 32 columns follow each other,
// whatever plane they belong to (place_of). Its dot products take signed weights: where two rows share a byte of two
// nibbles, which are no numbers of a table, the high one holds the quant less 8 (HIGH_SIGN).

#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace mobilellm {

constexpr int64_t GROUP = 32;  // rows of a group
constexpr int64_t BLOCK = 32;  // columns that share an activation scale

#ifdef __aarch64__
constexpr bool QUARTERED = true;
#else
constexpr bool QUARTERED = false;
#endif

constexpr uint8_t HIGH_SIGN = QUARTERED ? 0x80 : 0;

// Groups that hold n rows; the last one may be filled up.
constexpr int64_t n_groups_of(int64_t n_rows) {
    return (n_rows + GROUP - 1) / GROUP;
}

// Where the 4 bytes of row r of 16 in chunk i of n begin.
constexpr int64_t place_of(int64_t i, int64_t r, int64_t n) {
    return QUARTERED ? 16 * n * (r / 4) + 16 * i + 4 * (r % 4) : 64 * i + 4 * r;
}

// How a product has its weights brought to the caches before it reads them. What is best depends on the processor;
// no choice changes a bit of the result.
struct streaming {
    enum cache : uint8_t { none, nta, t2, t1, t0 };  // nothing is fetched; x86's four prefetch instructions

#ifdef __aarch64__
    cache hint = none;  // the streams of Cortex processors are fetched ahead by themselves
#else
    cache hint = t1;
#endif
    int64_t ahead = 1;  // so many times 64 columns of a group from what is read to what is fetched
};

constexpr int float_bytes(ggml_type type) {
    return type == GGML_TYPE_F32 ? 4 : type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 ? 2 : 0;
}

constexpr bool is_float(ggml_type type) {
    return float_bytes(type) > 0;
}

struct matrix {
    ggml_type       type;
    int64_t         n_cols;
    int64_t         n_rows;
    const uint8_t * data;  // 64-byte aligned
    streaming       stream = {};

    int64_t n_groups() const { return n_groups_of(n_rows); }

    int64_t n_blocks() const { return n_cols / BLOCK; }
};

// 32 quantized activations: x ≈ d · q with |q| ≤ 127 and d = max|x| / 127. Blocks whose largest value is below
// 1e-30 count as zero; where x holds a NaN or an infinity q is 0 and d is NaN, so that the result is NaN.
struct activations {
    int8_t  q[BLOCK];
    float   d;
    int32_t minus_sum;  // -Σ q, which takes back an offset of 1 in the weights, and that times 8
    int32_t minus_8_sum;
    int32_t minus_first_sum;  // that of the first 16
};

// Of a block whose q are there. static: a copy for each instruction set
static inline void set_sum(activations & block, int32_t sum) {
    int32_t first = 0;
    for (int i = 0; i < 16; ++i) {
        first += block.q[i];
    }
    block.minus_sum       = -sum;
    block.minus_8_sum     = -8 * sum;
    block.minus_first_sum = -first;
}

// True for floats and the types of form.h, in rows that divide by 64 and by the type's block.
bool packable(ggml_type type, int64_t n_cols);

// Whether a matrix of this name is packed where it holds floats: those of a Llama, which nothing but products and rows
// of the token embedding ask for. Others may be looked at in other ways.
bool packs_floats(const char * name);

// Bytes of one group, of a whole matrix (both multiples of 64), and of one row of activations.
size_t group_size(ggml_type type, int64_t n_cols);
size_t packed_size(ggml_type type, int64_t n_cols, int64_t n_rows);
size_t activation_size(int64_t n_cols);

// Packs groups [g0, g1) of a matrix whose rows lie one after the other as in GGUF; `out` is where group 0 goes.
void pack(ggml_type type, int64_t n_cols, int64_t n_rows, const void * rows, int64_t g0, int64_t g1, uint8_t * out);

// One row again: as in GGUF, byte for byte, and as floats.
void unpack(const matrix & m, int64_t row, void * out);
void unpack_row(const matrix & m, int64_t row, float * out);

struct kernels {
    // n_cols floats -> activation_size(n_cols) bytes, 4-byte aligned; the same bytes from every instruction set
    void (*quantize)(const float * x, int64_t n_cols, activations * out);

    // y[t · stride + r] = row r of groups [g0, g1) · q[t], where y[0] belongs to the first row of group g0 and the
    // n_tokens rows of activations (any number, 0 too) are activation_size(n_cols) bytes apart. Each token's result is
    // the same bit for bit however many there are.
    // Prefetches ahead in the stream of weights (for many tokens a group at a time) and, at its end, from `next` on
    // (nullptr: nothing), where the calling thread reads next. `later` (nullptr: nothing) is the data of a matrix of
    // the same shape whose turn comes later: where m's own weights come from the cache, a quarter of the same groups of
    // it is brought there meanwhile.
    void (*matmul)(const matrix & m, int64_t g0, int64_t g1, const activations * q, int64_t n_tokens, float * y,
                   int64_t stride, const void * next, const uint8_t * later);
};

// Whether a tensor's data is packed (it lies in the buffer type of packed_buffer.h), and its matrix when it is.
bool   packed(const ggml_tensor * tensor);
matrix as_matrix(const ggml_tensor * tensor);

}  // namespace mobilellm
