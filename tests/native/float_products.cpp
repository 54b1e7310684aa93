// Part of kernels.cpp: products of floats, every set against plain loops in doubles: LoRA's pairs and packed floats.

#include "random_numbers.h"

#include "dispatch.h"
#include "low_rank.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

using namespace mobilellm;

namespace {

int n_cases = 0;

// What a LoRA pair adds, of halves that are packed from several types; then of fewer tokens and groups, which changes
// no bit.
void test_low_rank(const fused_ops & ops, const kernels & products, const std::string & name, ggml_type type, bool wide,
                   int64_t n_cols, int64_t n_rows, int64_t rank, int64_t n_tokens) {
    const std::string at = name + (wide ? ": a wide pair of " : ": a pair of ") + ggml_type_name(type) + ", rank " +
                           std::to_string(rank) + ", " + std::to_string(n_cols) + " to " + std::to_string(n_rows) +
                           ", " + std::to_string(n_tokens) + " tokens";
    std::vector<float> a_values = normals(rank * n_cols), b_values = normals(n_rows * rank);
    const bool         far = type == GGML_TYPE_F32 || type == GGML_TYPE_BF16;
    for (int64_t r = 0; far && r < rank; ++r) {  // small and large ones: FP16's range is not enough
        for (int64_t c = 0; c < n_cols; ++c) {
            a_values[r * n_cols + c] *= std::ldexp(1.0f, int(7 * r % 80) - 40);
        }
        for (int64_t i = 0; i < n_rows; ++i) {
            b_values[i * rank + r] *= std::ldexp(1.0f, 40 - int(7 * r % 80));
        }
    }
    const auto tensor = [](ggml_type of, int64_t n, int64_t rows, std::vector<float> & values,
                           std::vector<uint8_t> & data) {
        data.resize(ggml_row_size(of, n) * rows);
        ggml_quantize_chunk(of, values.data(), data.data(), 0, rows, n, nullptr);
        if (of != GGML_TYPE_F32) {
            ggml_get_type_traits(of)->to_float(data.data(), values.data(), int64_t(values.size()));
        }
        ggml_tensor t = {};
        t.type        = of;
        t.ne[0]       = n;
        t.ne[1]       = rows;
        t.ne[2] = t.ne[3] = 1;
        t.nb[0]           = ggml_type_size(of);
        t.nb[1] = t.nb[2] = t.nb[3] = ggml_row_size(of, n);
        t.data                      = data.data();
        return t;
    };
    std::vector<uint8_t> a_data, b_data;
    const ggml_tensor    a = tensor(type, n_cols, rank, a_values, a_data);
    const ggml_tensor    b = tensor(GGML_TYPE_F32, rank, n_rows, b_values, b_data);

    std::vector<float> packed(low_rank_size(&a, &b, wide) / sizeof(float) + 1);
    pack_low_rank(&a, &b, wide, packed.data());
    const low_rank pair = as_low_rank(packed.data(), n_cols, n_rows, rank, wide, 0.7f);

    std::vector<float>   x      = normals(n_tokens * n_cols);
    const size_t         q_size = activation_size(n_cols);
    std::vector<uint8_t> q(n_tokens * q_size);
    const auto           token = [&](int64_t t) { return reinterpret_cast<activations *>(q.data() + t * q_size); };
    for (int64_t t = 0; t < n_tokens; ++t) {
        products.quantize(x.data() + t * n_cols, n_cols, token(t));
        for (int64_t c = 0; c < n_cols; ++c) {
            x[t * n_cols + c] = float(token(t)[c / BLOCK].q[c % BLOCK]) * token(t)[c / BLOCK].d;
        }
    }
    const auto input = [&](int64_t t) {
        return wide ? input_rows{ nullptr, x.data() + t * n_cols } : input_rows{ token(t), nullptr };
    };
    const int64_t      stride = padded_rank(rank) + 4, y_stride = n_rows + 5;
    std::vector<float> before = normals(n_tokens * y_stride), y = before, thin(n_tokens * stride);
    ops.reduce(pair, input(0), n_tokens, thin.data(), stride);
    ops.expand(pair, 0, (n_rows + GROUP - 1) / GROUP, thin.data(), stride, n_tokens, y.data(), y_stride);

    std::vector<double> expected(before.begin(), before.end());
    std::vector<double> bounds(expected.size());  // of what is added, without signs
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t r = 0; r < rank; ++r) {
            double sum = 0.0, magnitude = 0.0;
            for (int64_t c = 0; c < n_cols; ++c) {
                const activations & block = token(t)[c / BLOCK];
                const double        part  = double(a_values[r * n_cols + c]) * block.q[c % BLOCK] * block.d;
                sum += part;
                magnitude += std::fabs(part);
            }
            for (int64_t i = 0; i < n_rows; ++i) {
                expected[t * y_stride + i] += 0.7 * sum * b_values[i * rank + r];
                bounds[t * y_stride + i] += 0.7 * magnitude * std::fabs(b_values[i * rank + r]);
            }
        }
    }
    ++n_cases;
    for (size_t i = 0; i < y.size(); ++i) {  // either half keeps 11 bits, or all
        if (!(std::fabs(y[i] - expected[i]) <= (wide ? 2e-6 : 1e-3) * bounds[i] + 1e-6)) {
            std::printf("FAILED: %s: element %zu is %.9g, not %.9g\n", at.c_str(), i, y[i], expected[i]);
            std::exit(1);
        }
    }
    std::vector<float> again = before;
    for (int64_t t = 0; t < n_tokens; ++t) {
        ops.reduce(pair, input(t), 1, thin.data(), stride);
        for (int64_t g = 0; g < (n_rows + GROUP - 1) / GROUP; ++g) {
            ops.expand(pair, g, g + 1, thin.data(), stride, 1, again.data() + t * y_stride + g * GROUP, y_stride);
        }
    }
    if (again != y) {
        std::printf("FAILED: %s: other bits for a token alone\n", at.c_str());
        std::exit(1);
    }
}

// Packed floats: their rows are what was packed, and products are those of doubles. Tokens alone and together, groups
// in two parts, with any prefetching, have the same bits, and nothing is written past the last row.
void test_floats(const fused_ops & ops, const std::string & name, ggml_type type, int64_t n_cols, int64_t n_rows,
                 int64_t n_tokens) {
    const std::string at = name + ": rows of " + ggml_type_name(type) + ", " + std::to_string(n_cols) + " to " +
                           std::to_string(n_rows) + ", " + std::to_string(n_tokens) + " tokens";
    std::vector<float> w = normals(n_rows * n_cols, 0.05f);
    w[n_cols / 2]        = 1e-6f;  // of FP16's smallest
    std::vector<uint8_t> rows(ggml_row_size(type, n_cols) * n_rows);
    ggml_quantize_chunk(type, w.data(), rows.data(), 0, n_rows, n_cols, nullptr);
    if (type != GGML_TYPE_F32) {
        ggml_get_type_traits(type)->to_float(rows.data(), w.data(), int64_t(w.size()));
    }
    std::vector<uint8_t> memory(packed_size(type, n_cols, n_rows) + 64, 0xA5);
    auto * const data = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    matrix       m{ type, n_cols, n_rows, data };
    pack(type, n_cols, n_rows, rows.data(), m.n_groups() / 2, m.n_groups(), data);
    pack(type, n_cols, n_rows, rows.data(), 0, m.n_groups() / 2, data);
    for (int64_t r = 0; r < n_rows; ++r) {
        std::vector<uint8_t> row(rows.size() / n_rows);
        std::vector<float>   values(n_cols);
        unpack(m, r, row.data());
        unpack_row(m, r, values.data());
        if (!std::equal(row.begin(), row.end(), rows.begin() + r * row.size()) ||
            !std::equal(values.begin(), values.end(), w.begin() + r * n_cols)) {
            std::printf("FAILED: %s: row %d is not what was packed\n", at.c_str(), int(r));
            std::exit(1);
        }
    }
    const int64_t stride = n_rows + 3, middle = m.n_groups() / 2;
    const auto    x = normals(n_tokens * n_cols);

    std::vector<float> y(n_tokens * stride, -1.0f);
    ops.matmul(m, middle, m.n_groups(), x.data(), n_tokens, y.data() + middle * GROUP, stride, x.data());
    ops.matmul(m, 0, middle, x.data(), n_tokens, y.data(), stride, nullptr);
    ++n_cases;
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t r = 0; r < n_rows; ++r) {
            double sum = 0.0, magnitude = 0.0;
            for (int64_t c = 0; c < n_cols; ++c) {
                const double part = double(w[r * n_cols + c]) * x[t * n_cols + c];
                sum += part;
                magnitude += std::fabs(part);
            }
            if (!(std::fabs(y[t * stride + r] - sum) <= 1e-6 * magnitude)) {
                std::printf("FAILED: %s: row %d is %.9g, not %.9g\n", at.c_str(), int(r), y[t * stride + r], sum);
                std::exit(1);
            }
        }
        std::vector<float> one(stride, -1.0f);
        m.stream = { streaming::cache(t % 5), t % 7 };
        ops.matmul(m, 0, m.n_groups(), x.data() + t * n_cols, 1, one.data(), stride, nullptr);
        if (!std::equal(one.begin(), one.end(), y.begin() + t * stride)) {
            std::printf("FAILED: %s: other bits for a token alone\n", at.c_str());
            std::exit(1);
        }
    }
}

}  // namespace

// The number of cases.
int test_float_products(const fused_ops & ops, const kernels & products, const std::string & name) {
    n_cases = 0;
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        for (const int64_t n_rows : { 1, 3, 32, 70 }) {
            for (int64_t n_tokens = 0; n_tokens <= 14; ++n_tokens) {
                test_floats(ops, name, type, 64, n_rows, n_tokens);
            }
        }
        test_floats(ops, name, type, 1600, 64, 25);
    }
    for (const int64_t rank : { 1, 4, 9, 16, 64 }) {
        for (const int64_t n_tokens : { 1, 2, 5 }) {
            for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
                test_low_rank(ops, products, name, type, false, 192, 100, rank, n_tokens);
                test_low_rank(ops, products, name, type, true, 192, 100, rank, n_tokens);
            }
            test_low_rank(ops, products, name, GGML_TYPE_F32, false, 576, 64, rank, n_tokens);
        }
    }
    return n_cases;
}
