// What every 64-bit ARM processor has (Cortex-A53 and A72: Raspberry Pi 3 and 4): products of bytes are summed in 16
// bits, for as many chunks as fit there.

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

// So many chunks of a type's weights: Σ w q of a column of each fits 16 bits.
template <ggml_type TYPE>
constexpr int chunks_that_fit() {
    return 32767 / (127 * largest_weight<TYPE>());
}

template <int T, int R>
struct neon_tokens : plain_tokens<T, R> {
    using plain_tokens<T, R>::plain_tokens;

    static constexpr bool BOTH = false;

    // Of chunks 2 K0 to 2 (K0 + KS) - 1.
    template <ggml_type TYPE, bool SECOND, int K0, int KS>
    MOBILELLM_INLINE void sums(const uint8_t * quarters, int32x4_t (&low_sum)[T * R],
                               int32x4_t (&high_sum)[T * R]) const {
        if constexpr (chunks_that_fit<TYPE>() >= 2 * KS) {
            narrow<TYPE, SECOND, K0, KS>(quarters, low_sum, high_sum);
        } else {
            wide<TYPE, SECOND, K0, KS>(quarters, low_sum, high_sum);
        }
    }

    // All of them in 16 bits.
    template <ggml_type TYPE, bool SECOND, int K0, int KS>
    MOBILELLM_INLINE void narrow(const uint8_t * quarters, int32x4_t (&low_sum)[T * R],
                                 int32x4_t (&high_sum)[T * R]) const {
        sums_16 low[T * R];
        sums_16 high[T * R];
        each<KS>([&](auto k_) __attribute__((always_inline)) {
            constexpr int k = K0 + k_;
            int8x16_t     four[2 * T];
            each<2 * T>(MOBILELLM_EACH { four[i] = four_at(this->a[i % T][SECOND], 2 * k + i / T); });
            raw_chunks x[R];
            each<R>(MOBILELLM_EACH { x[i] = load<TYPE, SECOND, k, quarter_bytes<TYPE>() * i>(quarters); });
            // the next weights are taken out of their bytes before these are multiplied: A53 waits in order
            int8x16_t l = weights_of<TYPE, SECOND, false, 2 * k>(x[0]);
            int8x16_t h = weights_of<TYPE, SECOND, true, 2 * k>(x[0]);
            each<2 * R>([&](auto step_) __attribute__((always_inline)) {
                constexpr int   step   = step_;
                constexpr int   n      = step / R;
                constexpr int   r      = step % R;
                constexpr int   then   = step + 1 < 2 * R ? step + 1 : step;
                const int8x16_t low_w  = l;
                const int8x16_t high_w = h;
                if constexpr (then != step) {
                    l = weights_of<TYPE, SECOND, false, 2 * k + then / R>(x[then % R]);
                    h = weights_of<TYPE, SECOND, true, 2 * k + then / R>(x[then % R]);
                }
                each<T>(MOBILELLM_EACH {
                    constexpr int at = R * i + r;
                    if constexpr (k_ + n == 0) {
                        low[at].set(low_w, four[i]);
                        high[at].set(high_w, four[i]);
                    } else {
                        low[at].add(low_w, four[T * n + i]);
                        high[at].add(high_w, four[T * n + i]);
                    }
                });
            });
        });
        each<T * R>(MOBILELLM_EACH {
            const activations & a = this->a[i / R][SECOND];
            low_sum[i]            = widened<TYPE, low_offset<TYPE>(), K0, KS>(low[i], a);
            high_sum[i]           = widened<TYPE, high_offset<TYPE>(), K0, KS>(high[i], a);
        });
    }

    template <ggml_type TYPE, int OFFSET, int K0, int KS>
    static MOBILELLM_INLINE int32x4_t widened(const sums_16 & x, const activations & a) {
        const int32x4_t start = offset_of<OFFSET, form_of(TYPE).scaled, (K0 > 0)>(a);
        if constexpr (chunks_that_fit<TYPE>() >= 4 * KS) {  // two of them fit 16 bits, too
            const int16x8_t both = vpaddq_s16(x.a, x.b);
            return OFFSET ? vpadalq_s16(start, both) : vpaddlq_s16(both);
        } else {
            const int32x4_t both = vpaddq_s32(vpaddlq_s16(x.a), vpaddlq_s16(x.b));
            return OFFSET ? vaddq_s32(start, both) : both;
        }
    }

    // Two chunks at a time.
    template <ggml_type TYPE, bool SECOND, int K0, int KS>
    MOBILELLM_INLINE void wide(const uint8_t * quarters, int32x4_t (&low_sum)[T * R],
                               int32x4_t (&high_sum)[T * R]) const {
        static_assert(chunks_that_fit<TYPE>() >= 2 && low_offset<TYPE>() == 0 && high_offset<TYPE>() == 0);
        int32x4_t low[T * R][2];
        int32x4_t high[T * R][2];
        each<KS>([&](auto k_) __attribute__((always_inline)) {
            constexpr int k = K0 + k_;
            int8x16_t     four[2 * T];
            each<T>(MOBILELLM_EACH {
                four[2 * i]     = four_at(this->a[i][SECOND], 2 * k);
                four[2 * i + 1] = four_at(this->a[i][SECOND], 2 * k + 1);
            });
            each<R>([&](auto r_) __attribute__((always_inline)) {
                constexpr int    r = r_;
                const raw_chunks x = load<TYPE, SECOND, k, quarter_bytes<TYPE>() * r>(quarters);
                int8x16_t        w[2][2];
                each<2>(MOBILELLM_EACH {
                    w[0][i] = weights_of<TYPE, SECOND, false, 2 * k + i>(x);
                    w[1][i] = weights_of<TYPE, SECOND, true, 2 * k + i>(x);
                });
                each<2 * T>(MOBILELLM_EACH {  // low and high rows, token i / 2
                    int32x4_t(&to)[2] = (i % 2 ? high : low)[R * (i / 2) + r];
                    sums_16 s;
                    s.set(w[i % 2][0], four[i / 2 * 2]);
                    s.add(w[i % 2][1], four[i / 2 * 2 + 1]);
                    to[0] = k_ ? vpadalq_s16(to[0], s.a) : vpaddlq_s16(s.a);
                    to[1] = k_ ? vpadalq_s16(to[1], s.b) : vpaddlq_s16(s.b);
                });
            });
        });
        each<T * R>(MOBILELLM_EACH {
            low_sum[i]  = vpaddq_s32(low[i][0], low[i][1]);
            high_sum[i] = vpaddq_s32(high[i][0], high[i][1]);
        });
    }
};

struct neon_isa {
    static constexpr int TILE     = 4;
    static constexpr int ARRANGED = 0;

    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        // as many quarters at once as registers allow: planes take some
        constexpr int bits = form_of(TYPE).bits;
        constexpr int most = (bits & (bits - 1)) == 0 ? 4 : 2;
        mobilellm::tile<TYPE, neon_tokens<T, T == 1 ? most : T == 2 ? most / 2 : 1>>(p, q, q_size, y, stride, rows);
    }
};

}  // namespace

extern const kernels neon_kernels;
const kernels        neon_kernels = { quantize, matmul<neon_isa> };

}  // namespace mobilellm
