// The kernels in plain C++: what every other file must equal.

#include "form.h"
#include "kernels.h"

#include <cmath>
#include <cstring>

namespace mobilellm {

namespace {

void quantize(const float * x, int64_t n_cols, activations * out) {
    for (int64_t b = 0; b < n_cols / BLOCK; ++b, x += BLOCK, ++out) {
        float largest = 0.0f;
        bool  finite  = true;
        for (int64_t i = 0; i < BLOCK; ++i) {
            largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
            finite  = finite && std::isfinite(x[i]);
        }
        int32_t sum = 0;
        if (!finite || largest < 1e-30f) {
            std::memset(out->q, 0, sizeof(out->q));
            out->d = finite ? 0.0f : NAN;
            set_sum(*out, 0);
            continue;
        }
        const float factor = 127.0f / largest;
        for (int64_t i = 0; i < BLOCK; ++i) {
            out->q[i] = int8_t(std::nearbyint(x[i] * factor));
            sum += out->q[i];
        }
        out->d = largest / 127.0f;
        set_sum(*out, sum);
    }
}

float to_float(const uint8_t * half) {
    ggml_fp16_t bits;
    std::memcpy(&bits, half, 2);
    return ggml_fp16_to_fp32(bits);
}

// The rows of groups [g0, g1) times one row of activations.
template <ggml_type TYPE>
void matvec(const matrix & m, int64_t g0, int64_t g1, const activations * q, float * y) {
    constexpr form F = form_of(TYPE);

    for (int64_t row = g0 * GROUP; row < g1 * GROUP && row < m.n_rows; ++row) {
        const uint8_t * block = m.data + row / GROUP * group_size(m.type, m.n_cols);
        const int       r     = int(row % GROUP);

        float sum = 0.0f;
        for (int64_t col = 0; col < m.n_cols; col += F.columns, block += block_bytes(F)) {
            int8_t         memory[32 * MAX_SUBS];
            const int8_t * smaller = smaller_scales<TYPE>(block + 64 * F.halves, memory);
            for (int c = 0; c < F.columns; c += F.scaled) {
                const activations & a   = q[(col + c) / BLOCK];
                int32_t             dot = 0, all = 0;
                for (int i = c; i < c + F.scaled; ++i) {
                    const int quant = quant_at<TYPE>(block, i, r);
                    const int w     = F.bits == 8 ? int8_t(quant) : (F.table ? TABLE[quant] : quant) - F.offset;
                    dot += w * a.q[i % BLOCK];
                    all += a.q[i % BLOCK];
                }
                float scale = to_float(block + 2 * r);
                float least = F.halves == 2 ? to_float(block + 64 + 2 * r) : 0.0f;
                if (F.subs) {
                    scale *= smaller[32 * (c / F.scaled) + r];
                    least *= F.halves == 2 ? -smaller[32 * ((F.columns + c) / F.scaled) + r] : 0;
                }
                sum += float(dot) * a.d * scale;
                if (F.halves == 2) {
                    sum += float(all) * a.d * least;
                }
            }
        }
        y[row - g0 * GROUP] = sum;
    }
}

void matmul(const matrix & m, int64_t g0, int64_t g1, const activations * q, int64_t n_tokens, float * y,
            int64_t stride, const void *, const uint8_t *) {
    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * row = reinterpret_cast<const uint8_t *>(q) + t * activation_size(m.n_cols);
        with_type(m.type, [&](auto type) {
            matvec<decltype(type)::value>(m, g0, g1, reinterpret_cast<const activations *>(row), y + t * stride);
        });
    }
}

}  // namespace

extern const kernels scalar_kernels;
const kernels        scalar_kernels = { quantize, matmul };

}  // namespace mobilellm
