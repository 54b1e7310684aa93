// What every 64-bit ARM processor has (Cortex-A53 and A72: Raspberry Pi 3 and 4): products of bytes are summed in 16
// bits. A block's nibbles or bit pairs fit there (8 · 15 · 127 a lane), of bytes two products (2 · 128 · 127).

#include "arm/products.h"

namespace mobilellm {

namespace {

// The four activations against chunk C, four times.
MOBILELLM_INLINE int8x16_t four_at(const activations & a, int c) {
    return vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t *>(a.q) + c));
}

// Σ w q of a register's rows 0 and 1 (a), 2 and 3 (b), two columns of each to be added up.
struct sums_16 {
    int16x8_t a;
    int16x8_t b;

    MOBILELLM_INLINE void set(int8x16_t w, int8x16_t q) {
        a = vmull_s8(vget_low_s8(w), vget_low_s8(q));
        b = vmull_high_s8(w, q);
    }

    MOBILELLM_INLINE void add(int8x16_t w, int8x16_t q) {
        a = vmlal_s8(a, vget_low_s8(w), vget_low_s8(q));
        b = vmlal_high_s8(b, w, q);
    }
};

// The sums of T tokens and R quarters of the rows, [R t + r].
template <int T, int R>
struct block_sums {
    int32x4_t low[T * R];
    int32x4_t high[T * R];
};

// Weights of 4 or 2 bits: all of a block in 16 bits.
template <ggml_type TYPE, int T, int R, int SECOND>
MOBILELLM_INLINE block_sums<T, R> narrow_block(const uint8_t * quants, const activations * const (&a)[T]) {
    sums_16 low[T * R];
    sums_16 high[T * R];
    each<4>([&](auto k_) __attribute__((always_inline)) {
        constexpr int k = k_;
        int8x16_t     four[2 * T];
        each<2 * T>(MOBILELLM_EACH { four[i] = four_at(a[i % T][SECOND], 2 * k + i / T); });
        uint8x16_t x[R][2];
        each<R>(MOBILELLM_EACH { load_two<128 * i + 32 * k>(quants, x[i][0], x[i][1]); });
        // the next weights are taken out of their bytes before these are multiplied: A53 waits in order
        pair_of_rows w = weights_of<TYPE>(x[0][0], x[0][0], SECOND);
        int8x16_t    h = high_weights<TYPE>(w);
        each<2 * R>([&](auto step_) __attribute__((always_inline)) {
            constexpr int   step   = step_;
            constexpr int   n      = step / R;
            constexpr int   r      = step % R;
            constexpr int   then   = step + 1 < 2 * R ? step + 1 : step;
            const int8x16_t low_w  = w.low;
            const int8x16_t high_w = h;
            if constexpr (then != step) {
                w = weights_of<TYPE>(x[then % R][then / R], x[0][0], SECOND);
                h = high_weights<TYPE>(w);
            }
            each<T>(MOBILELLM_EACH {
                constexpr int at = R * i + r;
                if constexpr (k + n == 0) {
                    low[at].set(low_w, four[i]);
                    high[at].set(high_w, four[i]);
                } else {
                    low[at].add(low_w, four[T * n + i]);
                    high[at].add(high_w, four[T * n + i]);
                }
            });
        });
    });
    block_sums<T, R> sums;
    each<T * R>(MOBILELLM_EACH {
        // two of them fit 16 bits, too
        const activations & q = a[i / R][SECOND];
        const int16x8_t     l = vpaddq_s16(low[i].a, low[i].b);
        const int16x8_t     h = vpaddq_s16(high[i].a, high[i].b);
        sums.low[i]           = vpadalq_s16(vdupq_n_s32(low_offset<TYPE>(q)), l);
        sums.high[i] = TYPE == GGML_TYPE_Q2_0 ? vpadalq_s16(vdupq_n_s32(high_offset<TYPE>(q)), h) : vpaddlq_s16(h);
    });
    return sums;
}

// Q8_0: two products at a time.
template <int T, int R, int SECOND>
MOBILELLM_INLINE block_sums<T, R> wide_block(const uint8_t * quants, const activations * const (&a)[T]) {
    int32x4_t wide[2 * T * R][2];
    each<4>([&](auto c_) __attribute__((always_inline)) {
        constexpr int c = c_;
        int8x16_t     four[2 * T];
        each<T>(MOBILELLM_EACH {
            four[2 * i]     = four_at(a[i][SECOND], 2 * c);
            four[2 * i + 1] = four_at(a[i][SECOND], 2 * c + 1);
        });
        each<R>([&](auto r_) __attribute__((always_inline)) {
            constexpr int r = r_;
            pair_of_rows  w[2];
            weights_at<GGML_TYPE_Q8_0, c, 256 * r>(quants, SECOND, w);
            each<2 * T>(MOBILELLM_EACH {  // low and high rows, token i / 2
                int32x4_t(&to)[2] = wide[2 * R * (i / 2) + 2 * r + i % 2];
                sums_16 s;
                s.set(i % 2 ? w[0].both : w[0].low, four[i / 2 * 2]);
                s.add(i % 2 ? w[1].both : w[1].low, four[i / 2 * 2 + 1]);
                to[0] = c ? vpadalq_s16(to[0], s.a) : vpaddlq_s16(s.a);
                to[1] = c ? vpadalq_s16(to[1], s.b) : vpaddlq_s16(s.b);
            });
        });
    });
    block_sums<T, R> sums;
    each<T * R>(MOBILELLM_EACH {
        sums.low[i]  = vpaddq_s32(wide[2 * i][0], wide[2 * i][1]);
        sums.high[i] = vpaddq_s32(wide[2 * i + 1][0], wide[2 * i + 1][1]);
    });
    return sums;
}

template <ggml_type TYPE, int T, int R, int SECOND>
MOBILELLM_INLINE void add_block(const uint8_t * scales, const uint8_t * quants, const activations * const (&a)[T],
                                float32x4_t (&low_sum)[T * R], float32x4_t (&high_sum)[T * R]) {
    block_sums<T, R> sums;
    if constexpr (TYPE == GGML_TYPE_Q8_0) {
        sums = wide_block<T, R, SECOND>(quants, a);
    } else {
        sums = narrow_block<TYPE, T, R, SECOND>(quants, a);
    }
    if constexpr (T == 1) {
        const all_scales by(scales, a[0][SECOND].d);
        each<R>(MOBILELLM_EACH {
            low_sum[i]  = vfmaq_f32(low_sum[i], vcvtq_f32_s32(sums.low[i]), by.low[i]);
            high_sum[i] = vfmaq_f32(high_sum[i], vcvtq_f32_s32(sums.high[i]), by.high[i]);
        });
        return;
    }
    each<R>([&](auto r_) __attribute__((always_inline)) {
        constexpr int     r          = r_;
        const float32x4_t low_scale  = scales_at(scales + 8 * r);
        const float32x4_t high_scale = scales_at(scales + 32 + 8 * r);
        each<T>(MOBILELLM_EACH {
            constexpr int at = R * i + r;
            const float   d  = a[i][SECOND].d;
            low_sum[at]      = vfmaq_f32(low_sum[at], vcvtq_f32_s32(sums.low[at]), vmulq_n_f32(low_scale, d));
            high_sum[at]     = vfmaq_f32(high_sum[at], vcvtq_f32_s32(sums.high[at]), vmulq_n_f32(high_scale, d));
        });
    });
}

// R quarters of the rows from quarter r on, T tokens.
template <ggml_type TYPE, int T, int R>
__attribute__((noinline)) void narrow_rows(const part & p, int r, const uint8_t * q, size_t q_size, float (*y)[GROUP]) {
    float32x4_t         low[T * R];
    float32x4_t         high[T * R];
    const activations * a[T];
    each<T * R>(MOBILELLM_EACH { low[i] = high[i] = vdupq_n_f32(0.0f); });
    each<T>(MOBILELLM_EACH { a[i] = reinterpret_cast<const activations *>(q + i * q_size); });

    each_pair<TYPE>(p, r == 0 && fetches(p), [&](const uint8_t * pair) __attribute__((always_inline)) {
        const uint8_t * second = block_of<TYPE>(pair, true);
        add_block<TYPE, T, R, 0>(pair + 8 * r, pair + SCALES + quarter_bytes<TYPE>() * r, a, low, high);
        add_block<TYPE, T, R, 1>(second + 8 * r, second + SCALES + quarter_bytes<TYPE>() * r, a, low, high);
        each<T>(MOBILELLM_EACH { a[i] += 2; });
    });
    each<T * R>(MOBILELLM_EACH {
        vst1q_f32(y[i / R] + 4 * (r + i % R), low[i]);
        vst1q_f32(y[i / R] + 16 + 4 * (r + i % R), high[i]);
    });
}

struct neon_isa {
    static constexpr int TILE     = 4;
    static constexpr int ARRANGED = 0;

    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        constexpr int R = T == 1 ? 4 : T == 2 ? 2 : 1;
        float         sums[T][GROUP];
        for (int r = 0; r < QUARTERS; r += R) {
            narrow_rows<TYPE, T, R>(p, r, q, q_size, sums);
        }
        for (int t = 0; t < T; ++t) {
            store_rows(sums[t], y + t * stride, rows);
        }
    }
};

}  // namespace

extern const kernels neon_kernels;
const kernels        neon_kernels = { quantize, matmul<neon_isa> };

}  // namespace mobilellm
