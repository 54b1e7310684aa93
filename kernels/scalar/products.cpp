// The kernels in plain C++: what every other file must equal.

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

// The weight of row r of a group that stands against column `col` of a block of activations; `second`: which one of
// two that share a block of weights.
int weight(ggml_type type, const uint8_t * quants, bool second, int64_t col, int64_t r) {
    const int64_t at = 4 * (r % 16) + col % 4;
    switch (type) {
        case GGML_TYPE_Q4_0: {
            const uint8_t both = quants[64 * (col / 4) + at] ^ HIGH_SIGN;
            return (r < 16 ? both & 15 : both >> 4) - 8;
        }
        case GGML_TYPE_Q8_0:
            return int8_t(quants[64 * (col / 4 * 2 + r / 16) + at]);
        default:  // Q2_0: two blocks of activations in one of weights
            return (quants[64 * (col / 4) + at] >> (4 * second + r / 16 * 2) & 3) - 1;
    }
}

// The rows of groups [g0, g1) times one row of activations.
void matvec(const matrix & m, int64_t g0, int64_t g1, const activations * q, float * y) {
    const int64_t per_scale = m.type == GGML_TYPE_Q2_0 ? 2 : 1;  // blocks of activations
    const size_t  size      = group_size(m.type, m.n_cols);

    for (int64_t row = g0 * GROUP; row < g1 * GROUP && row < m.n_rows; ++row) {
        const uint8_t * group = m.data + row / GROUP * size;
        const int64_t   r     = row % GROUP;

        float sum = 0.0f;
        for (int64_t b = 0; b < m.n_blocks(); ++b) {
            const uint8_t * scales = group + size / (m.n_blocks() / per_scale) * (b / per_scale);

            int32_t dot = 0;
            for (int64_t col = 0; col < BLOCK; ++col) {
                dot += weight(m.type, scales + GROUP * 2, b % per_scale, col, r) * q[b].q[col];
            }
            ggml_fp16_t scale;
            std::memcpy(&scale, scales + 2 * r, 2);
            sum += float(dot) * q[b].d * ggml_fp16_to_fp32(scale);
        }
        y[row - g0 * GROUP] = sum;
    }
}

void matmul(const matrix & m, int64_t g0, int64_t g1, const activations * q, int64_t n_tokens, float * y,
            int64_t stride, const void *, const uint8_t *) {
    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * row = reinterpret_cast<const uint8_t *>(q) + t * activation_size(m.n_cols);
        matvec(m, g0, g1, reinterpret_cast<const activations *>(row), y + t * stride);
    }
}

}  // namespace

extern const kernels scalar_kernels;
const kernels        scalar_kernels = { quantize, matmul };

}  // namespace mobilellm
