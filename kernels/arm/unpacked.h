// Prompts by dot products. What decoding takes from nibbles at every product is taken out of them once here, for all
// tokens: 16 rows of a group, low or high ones, become signed bytes in a buffer that the first-level cache holds. Then
// a tile is 16 rows × 4 tokens. Its sums and the tokens' 32 columns stay in registers, so that a load of 4 registers
// serves 64 products. Integers and the order of sums are those of products.h: no bit differs.
//
// An instruction set (ISA) names how it holds four tokens (FOUR, one of products.h's ways), which brings three members:
// `order` puts two registers of 4 rows × 4 columns as it likes to read them, `spread` a number of each of 4 rows, and
// `tile` multiplies. That is assembly, because it needs all 32 registers and loads 4 of them at once.

#pragma once

#include "arm/products.h"

namespace mobilellm {

namespace {

constexpr int64_t FEWEST_UNPACKED = 16;  // tokens; taking out costs what 7 of them save

alignas(64) constexpr int32_t ZEROS[16] = {};  // a load of them clears four registers

// A tile over n_pairs of blocks. Registers 0 to 15 are its sums as floats, 16 to 23 the columns of four tokens, 24 to
// 27 sums of integers, 28 to 31 weights and then scales. ROWS multiplies the next 4 rows of a block and adds them to
// four sums, END takes q to the next block, and STORE finds y and 4 stride, in bytes.
// clang-format off
#define MOBILELLM_ZERO(A, B) "ld1 {v" A ".16b-v" B ".16b}, [%[zeros]]\n\t"
#define MOBILELLM_LOAD(A, B, FROM) "ld1 {v" A ".16b-v" B ".16b}, [%[" FROM "]], #64\n\t"
#define MOBILELLM_BLOCK(ROWS, END)                                                       \
    MOBILELLM_LOAD("16", "19", "q") MOBILELLM_LOAD("20", "23", "q")                      \
    ROWS("0", "4", "8", "12") ROWS("1", "5", "9", "13") ROWS("2", "6", "10", "14") ROWS("3", "7", "11", "15") END
#define MOBILELLM_TILE(ROWS, END, STORE)                                                 \
    __asm__ volatile(                                                                    \
        MOBILELLM_ZERO("0", "3") MOBILELLM_ZERO("4", "7")                                \
        MOBILELLM_ZERO("8", "11") MOBILELLM_ZERO("12", "15")                             \
        "1:\n\t"                                                                         \
        MOBILELLM_BLOCK(ROWS, END) MOBILELLM_BLOCK(ROWS, END)                            \
        "subs %[n], %[n], #1\n\t"                                                        \
        "b.ne 1b\n\t" STORE                                                              \
        : [w] "+r"(w), [q] "+r"(q), [n] "+r"(n_pairs), [y] "+r"(y)                       \
        : [zeros] "r"(ZEROS), [stride] "r"(4 * stride)                                   \
        : "memory", "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9",    \
          "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20",   \
          "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31")
// clang-format on

// Word i of register t becomes word t of register i.
MOBILELLM_INLINE void transpose(int32x4_t (&x)[4]) {
    const int32x4_t a = vzip1q_s32(x[0], x[2]);
    const int32x4_t b = vzip2q_s32(x[0], x[2]);
    const int32x4_t c = vzip1q_s32(x[1], x[3]);
    const int32x4_t d = vzip2q_s32(x[1], x[3]);
    x[0]              = vzip1q_s32(a, c);
    x[1]              = vzip2q_s32(a, c);
    x[2]              = vzip1q_s32(b, d);
    x[3]              = vzip2q_s32(b, d);
}

// 16 bytes of block b of four tokens, from byte 16 PART on; the last 16 are its d and sums.
template <int PART>
MOBILELLM_INLINE void load_four(const uint8_t * q, size_t q_size, int64_t b, int32x4_t (&x)[4]) {
    static_assert(sizeof(activations) == 48 && offsetof(activations, minus_first_sum) == 44);
    each<4>(MOBILELLM_EACH {
        x[i] = vld1q_s32(reinterpret_cast<const int32_t *>(q + i * q_size + b * sizeof(activations) + 16 * PART));
    });
}

// 4 rows × 32 columns; 16 rows and then all their columns follow.
template <ggml_type TYPE, class FOUR>
struct unpacked {
    int8_t w[4][32];                                        // 8 columns at a time
    float  halves[form_of(TYPE).halves][4 * FOUR::SPREAD];  // scales, and then minima
};

// The low rows of a group, or the high ones.
template <ggml_type TYPE, bool HIGH, class FOUR>
void unpack_half(const uint8_t * group, int64_t n_pairs, unpacked<TYPE, FOUR> * out) {
    constexpr form F      = form_of(TYPE);
    constexpr int  offset = HIGH ? high_offset<TYPE>() : low_offset<TYPE>();
    for (const uint8_t * end = group + n_pairs * pair_bytes<TYPE>(); group != end; group += pair_bytes<TYPE>()) {
        each<2 * QUARTERS>([&](auto step_) __attribute__((always_inline)) {
            constexpr bool  second = step_ >= QUARTERS;
            constexpr int   r      = step_ % QUARTERS;
            const uint8_t * block  = block_of<TYPE>(group, second);
            auto &          to     = out[step_];
            each<4>([&](auto k_) __attribute__((always_inline)) {
                constexpr int    k = k_;
                const raw_chunks x = load<TYPE, second, k, quarter_bytes<TYPE>() * r>(block + header_bytes(F));
                int8x16_t        w[2];
                each<2>(MOBILELLM_EACH {
                    w[i] = weights_of<TYPE, second, HIGH, 2 * k + i>(x);
                    w[i] = offset ? vsubq_s8(w[i], vdupq_n_s8(offset)) : w[i];
                });
                FOUR::order(w);
                vst1q_s8(to.w[k], w[0]);
                vst1q_s8(to.w[k] + 16, w[1]);
            });
            each<F.halves>(MOBILELLM_EACH {
                const uint8x8_t bytes = vld1_u8(block + 64 * i + 32 * HIGH + 8 * r);
                FOUR::spread(vcvt_f32_f16(vreinterpret_f16_u8(bytes)), to.halves[i]);
            });
        });
        out += 2 * QUARTERS;
    }
}

// Those rows times n fours of tokens; meanwhile the group at `then` is fetched (nullptr: nothing).
template <ggml_type TYPE, class FOUR>
__attribute__((noinline)) void multiply_half(const unpacked<TYPE, FOUR> * w, int64_t n_pairs, const uint8_t * q,
                                             int64_t n, float * y, int64_t stride, int64_t rows, const uint8_t * then) {
    constexpr bool  least = form_of(TYPE).halves == 2;
    const int64_t   part  = (n_pairs * pair_bytes<TYPE>() / 64 + n - 1) / n * 64;  // that is fetched at a time
    const uint8_t * end   = then;
    for (int64_t i = 0; i < n; ++i, q += 2 * n_pairs * FOUR::BYTES, y += 4 * stride) {
        if (then) {
            for (end += part; then < end; then += 64) {
                __builtin_prefetch(then, 0, 2);
            }
        }
        if (rows == 16) {
            FOUR::template tile<least>(w, q, n_pairs, y, stride);
        } else {
            float all[4][16];
            FOUR::template tile<least>(w, q, n_pairs, all[0], 16);
            for (int t = 0; t < 4; ++t) {
                std::memcpy(y + t * stride, all[t], rows * sizeof(float));
            }
        }
    }
}

// Memory for as long as a product takes.
struct scratch {
    explicit scratch(size_t size) : data(static_cast<uint8_t *>(std::malloc(size))) {}

    scratch(const scratch &) = delete;

    ~scratch() { std::free(data); }

    uint8_t * data;  // nullptr where there is none
};

// As kernels.h's matmul, n_tokens being a multiple of four; false where memory is short. Of what comes later it only
// fetches the next group: all else of a prompt is far away.
template <class ISA, ggml_type TYPE>
bool multiply_unpacked(const matrix & m, int64_t g0, int64_t g1, const activations * activation, int64_t n_tokens,
                       float * y, int64_t stride, const void * next) {
    using FOUR             = typename ISA::four;
    const size_t  q_size   = activation_size(m.n_cols);
    const int64_t n_pairs  = m.n_cols / 64;
    const int64_t size     = n_pairs * pair_bytes<TYPE>();  // of a group
    const int64_t arranged = 2 * n_pairs * ISA::ARRANGED;   // bytes of four tokens
    const auto *  q        = reinterpret_cast<const uint8_t *>(activation);

    // tokens that stay in half of the second-level cache while all groups pass
    const int64_t kept  = second_level_share(1) / 2 / arranged * 4;
    const int64_t chunk = kept < 4 * FEWEST_UNPACKED ? 4 * FEWEST_UNPACKED : kept;
    const scratch squares(2 * n_pairs * QUARTERS * sizeof(unpacked<TYPE, FOUR>));
    const scratch tiles((chunk < n_tokens ? chunk : n_tokens) / 4 * arranged);
    if (!squares.data || !tiles.data) {
        return false;
    }
    auto * const half = reinterpret_cast<unpacked<TYPE, FOUR> *>(squares.data);
    for (int64_t t0 = 0; t0 < n_tokens; t0 += chunk) {
        const int64_t n = (t0 + chunk < n_tokens ? chunk : n_tokens - t0) / 4;
        for (int64_t i = 0; i < n; ++i) {
            ISA::arrange(q + (t0 + 4 * i) * q_size, q_size, 2 * n_pairs, tiles.data + i * arranged);
        }
        for (int64_t g = g0; g < g1; ++g) {
            const uint8_t * group = m.data + g * size;
            const uint8_t * then  = g + 1 < g1 ? group + size : static_cast<const uint8_t *>(next);
            each<2>([&](auto high_) __attribute__((always_inline)) {
                constexpr bool high = high_;
                const int64_t  row  = g * GROUP + 16 * high;
                const int64_t  rows = m.n_rows - row < 16 ? m.n_rows - row : 16;
                if (rows <= 0) {
                    return;
                }
                unpack_half<TYPE, high, FOUR>(group, n_pairs, half);
                float * const to = y + t0 * stride + row - g0 * GROUP;
                multiply_half<TYPE, FOUR>(half, n_pairs, tiles.data, n, to, stride, rows, high ? then : nullptr);
            });
        }
    }
    return true;
}

// matmul that unpacks where there are tokens enough; types with smaller scales are not unpacked.
template <class ISA>
void matmul_unpacking(const matrix & m, int64_t g0, int64_t g1, const activations * q, int64_t n_tokens, float * y,
                      int64_t stride, const void * next, const uint8_t * later) {
    const int64_t whole = n_tokens < FEWEST_UNPACKED ? 0 : n_tokens / 4 * 4;
    bool          done  = false;
    with_type(m.type, [&](auto type_) {
        constexpr ggml_type type = decltype(type_)::value;
        if constexpr (form_of(type).subs == 0) {
            done = whole > 0 && multiply_unpacked<ISA, type>(m, g0, g1, q, whole, y, stride, next);
        }
    });
    if (!done) {
        matmul<ISA>(m, g0, g1, q, n_tokens, y, stride, next, later);
    } else if (whole < n_tokens) {
        const uint8_t * rest = reinterpret_cast<const uint8_t *>(q) + whole * activation_size(m.n_cols);
        matmul<ISA>(m, g0, g1, reinterpret_cast<const activations *>(rest), n_tokens - whole, y + whole * stride,
                    stride, next, later);
    }
}

}  // namespace

}  // namespace mobilellm
