// Part of kernels.cpp: the operations between the matrices, every set against plain loops in doubles.

#include "random_numbers.h"

#include "dispatch.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

using namespace mobilellm;

int test_float_products(const fused_ops & ops, const kernels & products,
                        const std::string & name);  // float_products.cpp

namespace {

int n_cases = 0;

// within 1e-5 of the largest magnitude of their row
template <typename T>
void compare(const std::string & what, const std::vector<float> & x, const std::vector<T> & y, size_t row) {
    double largest = 0.0;
    ++n_cases;
    for (size_t i = 0; i < x.size(); ++i) {
        if (i % row == 0) {
            largest = 0.0;
            for (size_t j = i; j < i + row; ++j) {
                largest = std::max(largest, std::fabs(double(y[j])));
            }
        }
        if (!(std::fabs(double(x[i]) - double(y[i])) <= 1e-5 * largest)) {
            std::printf("FAILED: %s: element %zu is %.9g, not %.9g\n", what.c_str(), i, x[i], double(y[i]));
            std::exit(1);
        }
    }
}

void test_rows(const fused_ops & ops, const std::string & name) {
    for (const int64_t n : { 32, 64, 160, 576, 960, 1600 }) {
        for (const float scale : { 1e-6f, 1.0f, 100.0f }) {
            const std::string  at = name + ", n = " + std::to_string(n);
            std::vector<float> x  = normals(n, scale);
            std::vector<float> w  = normals(n);
            std::vector<float> y(n);

            std::vector<double> expected(n);
            double              squares = 0.0;
            for (const float value : x) {
                squares += double(value) * value;
            }
            for (int64_t i = 0; i < n; ++i) {
                expected[i] = x[i] / std::sqrt(squares / double(n) + 1e-5) * w[i];
            }
            ops.rms_norm(x.data(), w.data(), n, 1e-5f, y.data());
            compare(at + ": rms_norm", y, expected, n);

            for (int64_t i = 0; i < n; ++i) {
                expected[i] = double(x[i]) / (1.0 + std::exp(-double(x[i]))) * w[i];
            }
            ops.silu_mul(x.data(), w.data(), n, y.data());
            compare(at + ": silu_mul", y, expected, n);

            for (int64_t i = 0; i < n; ++i) {
                expected[i] = double(x[i]) + w[i];
            }
            y = x;
            ops.add(y.data(), w.data(), n);
            compare(at + ": add", y, expected, n);
        }
    }
    // far from zero
    std::vector<float> x = { -1e30f, -200.0f, -90.0f, -88.0f, -20.0f, 0.0f, -0.0f, 20.0f, 88.0f, 90.0f, 200.0f, 1e30f };
    x.resize(32, 1.0f);
    for (size_t i = 0; i < x.size(); ++i) {  // one by one, each against itself
        std::vector<float> one(32, x[i]);
        std::vector<float> up(32, 1.0f);
        std::vector<float> y(32);
        ops.silu_mul(one.data(), up.data(), 32, y.data());
        const double expected = double(x[i]) / (1.0 + std::exp(-double(x[i])));
        if (!(std::fabs(y[7] - expected) <= std::max(1e-5 * std::fabs(expected), 1e-37 * std::fabs(x[i])))) {
            std::printf("FAILED: %s: silu(%g) is %g, not %g\n", name.c_str(), x[i], y[7], expected);
            std::exit(1);
        }
    }
    std::vector<float> nothing(32, NAN), up(32, 1.0f), y(32);
    ops.silu_mul(nothing.data(), up.data(), 32, y.data());
    if (!std::isnan(y[31])) {
        std::printf("FAILED: %s: silu(NaN) is a number\n", name.c_str());
        std::exit(1);
    }
}

void test_hadamard(const fused_ops & ops, const std::string & name) {
    for (const int64_t size : { 32, 64, 128 }) {
        const int64_t       n = 3 * size;
        std::vector<float>  x = normals(n);
        std::vector<double> expected(n, 0.0);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < size; ++j) {  // Sylvester's matrix: the sign is the parity of i & j
                const int sign = __builtin_popcountll((i % size) & j) % 2 ? -1 : 1;
                expected[i] += sign * double(x[i / size * size + j]) / std::sqrt(double(size));
            }
        }
        ops.hadamard(x.data(), n, size);
        compare(name + ": hadamard " + std::to_string(size), x, expected, size);
    }
}

// A cache of any type: one KV head that nobody reads, then `heads`.
struct cache {
    cache(ggml_type type, int64_t n_cells, int64_t n_embd_head, const fused_ops & ops, int heads = 1) {
        const int64_t n_heads = 1 + heads;
        const int64_t row     = ggml_row_size(type, n_embd_head);
        memory.assign(n_cells * n_heads * row, 0xFF);  // NaN where nothing was written
        values.resize(heads * n_cells * n_embd_head);

        all  = { memory.data(), type, n_heads * row, row, 0 };
        view = all;
        view.data += all.head;
        for (int64_t i = 0; i < heads * n_cells; ++i) {
            const std::vector<float> x = normals(n_embd_head);
            std::vector<uint8_t>     stored(row);
            ops.store(x.data(), n_embd_head, type, stored.data());

            float * back = values.data() + i * n_embd_head;
            if (type == GGML_TYPE_F32) {
                std::memcpy(back, stored.data(), row);
            } else {
                ggml_get_type_traits(type)->to_float(stored.data(), back, n_embd_head);
            }
            for (int64_t e = 0; e < n_embd_head; ++e) {  // half a step of int8, or of fp16
                const float largest = std::fabs(*std::max_element(
                    x.begin(), x.end(), [](float a, float b) { return std::fabs(a) < std::fabs(b); }));
                if (!(std::fabs(back[e] - x[e]) <= largest * (type == GGML_TYPE_Q8_0 ? 0.0045f : 0.0005f))) {
                    std::printf("FAILED: %s is stored as %g, not %g\n", ggml_type_name(type), back[e], x[e]);
                    std::exit(1);
                }
            }
            uint8_t * base = const_cast<uint8_t *>(view.data) + i / n_cells * view.head + i % n_cells * view.cell;
            std::memcpy(base, stored.data(), row);
        }
    }

    std::vector<uint8_t> memory;
    std::vector<float>   values;  // (heads, n_cells, n_embd_head) as the cache holds them
    head_cache           all;
    head_cache           view;  // from the first of `heads` on
};

void test_attention(const fused_ops & ops, const std::string & name, ggml_type k_type, ggml_type v_type,
                    int64_t n_embd_head, int n_group, int64_t n_cache, bool gaps) {
    const std::string at = name + ": attention, K " + ggml_type_name(k_type) + ", V " + ggml_type_name(v_type) + ", " +
                           std::to_string(n_embd_head) + " wide, " + std::to_string(n_group) + " heads, " +
                           std::to_string(n_cache) + " cells" + (gaps ? " with gaps" : "");
    constexpr int        n_heads = 2;
    const cache          k(k_type, n_cache, n_embd_head, ops, n_heads);
    const cache          v(v_type, n_cache, n_embd_head, ops, n_heads);
    std::vector<int32_t> cells;
    for (int32_t c = 0; c < n_cache; ++c) {
        if (!gaps || generator() % 3 != 0 || c + 1 == n_cache) {
            cells.push_back(c);
        }
    }
    const int64_t            n_all  = n_heads * n_group;
    const int64_t            stride = n_all * n_embd_head;
    const std::vector<float> q      = normals(stride, 0.5f);

    // every shard on its own, then combined, as threads do; all heads at once or one by one
    const auto attend = [&](int at_once) {
        const int          n_shards = cells.size() < 3 ? 1 : 3;
        std::vector<float> rows(2 * max_scores * n_embd_head);
        std::vector<float> scores(n_group * max_scores), out(n_shards * stride), y(stride);
        std::vector<float> largest(n_shards * n_all), sum(n_shards * n_all);
        for (int s = 0; s < n_shards; ++s) {
            const size_t begin = cells.size() * s / n_shards, end = cells.size() * (s + 1) / n_shards;
            for (int head = 0; head < n_heads; head += at_once) {
                const int64_t slot = s * n_all + head * n_group;
                ops.attend({ n_embd_head, 1 + head, at_once, n_group, q.data() + head * n_group * n_embd_head, k.all,
                             v.all, cells.data() + begin, int64_t(end - begin), s == 0, int64_t(cells.size() - end),
                             scores.data(), rows.data(), out.data() + slot * n_embd_head, largest.data() + slot,
                             sum.data() + slot });
            }
        }
        ops.combine(out.data(), largest.data(), sum.data(), n_shards, stride, n_all, n_embd_head, y.data());
        return y;
    };
    const std::vector<float> y = attend(n_heads);
    if (attend(1) != y) {
        std::printf("FAILED: %s: other bits for a head alone\n", at.c_str());
        std::exit(1);
    }

    std::vector<double> expected(stride, 0.0);
    for (int g = 0; g < n_all; ++g) {
        const int64_t       first = g / n_group * n_cache;
        std::vector<double> p;
        double              total = 0.0;
        for (const int32_t c : cells) {
            double dot = 0.0;
            for (int64_t e = 0; e < n_embd_head; ++e) {
                dot += double(q[g * n_embd_head + e]) * k.values[(first + c) * n_embd_head + e];
            }
            p.push_back(std::exp(dot));
            total += p.back();
        }
        for (size_t i = 0; i < cells.size(); ++i) {
            for (int64_t e = 0; e < n_embd_head; ++e) {
                expected[g * n_embd_head + e] += p[i] / total * v.values[(first + cells[i]) * n_embd_head + e];
            }
        }
    }
    compare(at, y, expected, n_embd_head);
}

// Several tokens, each of which sees cells of its own; then some of them without the others, which changes no bit.
void test_attention_tile(const fused_ops & ops, const std::string & name, ggml_type type, int64_t n_embd_head,
                         int n_group, int64_t n_cache, int64_t n_tokens) {
    const std::string at = name + ": attention tile, " + ggml_type_name(type) + ", " + std::to_string(n_embd_head) +
                           " wide, " + std::to_string(n_group) + " heads, " + std::to_string(n_cache) + " cells, " +
                           std::to_string(n_tokens) + " tokens";
    const cache           k(type, n_cache, n_embd_head, ops);
    const cache           v(type, n_cache, n_embd_head, ops);
    const int64_t         width    = n_group * n_embd_head;
    const int64_t         q_stride = width + 32, out_stride = width + 16;
    std::vector<float>    q = normals(n_tokens * q_stride, 0.5f);
    std::vector<uint64_t> sees(n_cache);  // bit t: token t
    std::vector<int32_t>  positions(n_cache);
    std::iota(positions.begin(), positions.end(), 0);
    for (int64_t t = 0; t < n_tokens; ++t) {
        const int64_t past = n_cache * (t + 1) / n_tokens;  // causal
        for (int64_t c = 0; c < std::max(past, int64_t(1)); ++c) {
            const bool hole = n_tokens % 2 && c > 0 && (c % 5 == t % 5 || c / 64 == 1);
            const bool late = past > 129 && c < past - 40 - t;  // a window: nothing in the first blocks
            sees[c] |= uint64_t(!hole && !late) << t;
        }
    }
    // of tokens [first, last); `whole`: with the bits of all
    const auto run = [&](int64_t first, int64_t last, bool whole) {
        std::vector<int32_t>  cells;
        std::vector<uint64_t> seen;
        const uint64_t        these = (~uint64_t(0) >> (64 - (last - first)));
        for (int32_t c = 0; c < n_cache; ++c) {
            if (sees[c] >> first & these) {
                cells.push_back(c);
                seen.push_back(whole ? sees[c] : sees[c] >> first & these);
            }
        }
        std::vector<float> work(attention_tile_work(n_embd_head, n_group), NAN);
        std::vector<float> out((last - first) * out_stride, 7.0f);
        ops.attend_tile({ n_embd_head, n_group, last - first, q.data() + first * q_stride, q_stride, k.view, v.view,
                          cells.data(), positions.data(), seen.data(), whole ? first : 0, int64_t(cells.size()),
                          work.data(), out.data(), out_stride });
        return out;
    };

    const std::vector<float> out = run(0, n_tokens, true);
    std::vector<float>       got;
    std::vector<double>      expected;
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t i = width; i < out_stride; ++i) {
            if (out[t * out_stride + i] != 7.0f) {
                std::printf("FAILED: %s: written between the rows\n", at.c_str());
                std::exit(1);
            }
        }
        got.insert(got.end(), out.begin() + t * out_stride, out.begin() + t * out_stride + width);
        for (int g = 0; g < n_group; ++g) {
            std::vector<double> y(n_embd_head, 0.0);
            double              total = 0.0;
            for (int64_t c = 0; c < n_cache; ++c) {
                if (!(sees[c] >> t & 1)) {
                    continue;
                }
                double dot = 0.0;
                for (int64_t e = 0; e < n_embd_head; ++e) {
                    dot += double(q[t * q_stride + g * n_embd_head + e]) * k.values[c * n_embd_head + e];
                }
                total += std::exp(dot);
                for (int64_t e = 0; e < n_embd_head; ++e) {
                    y[e] += std::exp(dot) * v.values[c * n_embd_head + e];
                }
            }
            for (int64_t e = 0; e < n_embd_head; ++e) {
                expected.push_back(y[e] / total);
            }
        }
    }
    compare(at, got, expected, n_embd_head);

    for (const bool whole : { false, true }) {
        const std::vector<float> some = run(n_tokens / 3, n_tokens - n_tokens / 4, whole);
        if (std::memcmp(some.data(), out.data() + n_tokens / 3 * out_stride, some.size() * sizeof(float)) != 0) {
            std::printf("FAILED: %s: tokens differ without the others\n", at.c_str());
            std::exit(1);
        }
    }

    // a key and a value that are not finite spoil what those get who see them, and nothing else
    if (type == GGML_TYPE_F32) {
        const int64_t bad = n_cache / 2;
        auto *        row = reinterpret_cast<float *>(const_cast<uint8_t *>(v.view.data) + bad * v.view.cell);
        row[3]            = n_tokens % 2 ? INFINITY : NAN;
        reinterpret_cast<float *>(const_cast<uint8_t *>(k.view.data) + bad * k.view.cell)[5] = NAN;
        const std::vector<float> spoilt                                                      = run(0, n_tokens, true);
        for (int64_t t = 0; t < n_tokens; ++t) {
            const float * y    = spoilt.data() + t * out_stride;
            const bool    same = std::memcmp(y, out.data() + t * out_stride, width * sizeof(float)) == 0;
            if (sees[bad] >> t & 1 ? !std::isnan(y[0]) || !std::isnan(y[width - 1]) : !same) {
                std::printf("FAILED: %s: a cell that is not finite, token %d\n", at.c_str(), int(t));
                std::exit(1);
            }
        }
    }
}

void test(const fused_ops & ops, const kernels & products, const std::string & name) {
    n_cases = test_float_products(ops, products, name);
    test_rows(ops, name);
    test_hadamard(ops, name);
    for (const int64_t n_cache : { 1, 5, 33, 70 }) {
        for (const int n_group : { 1, 3, 4, 7 }) {
            for (const bool gaps : { false, true }) {
                for (const ggml_type k : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                    for (const ggml_type v : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                        test_attention(ops, name, k, v, 64, n_group, n_cache, gaps);
                        test_attention(ops, name, k, v, 96, n_group, n_cache, gaps);
                    }
                }
            }
        }
    }
    for (const int n_group : { 1, 3, 7 }) {  // shards of more than one block
        for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            test_attention(ops, name, type, type, 64, n_group, 700, true);
        }
        test_attention(ops, name, GGML_TYPE_F32, GGML_TYPE_F32, 32, n_group, 2000, n_group == 3);
    }
    for (const int64_t n_tokens : { 1, 2, 7, 16, 33, 48 }) {
        for (const int64_t n_cache : { 1, 31, 64, 65, 200 }) {
            for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                test_attention_tile(ops, name, type, 64, 3, n_cache, n_tokens);
                test_attention_tile(ops, name, type, 96, 1, n_cache, n_tokens);
                test_attention_tile(ops, name, type, 128, 2, n_cache, n_tokens);
                test_attention_tile(ops, name, type, 32, 5, n_cache, n_tokens);
            }
        }
    }
    std::printf("between matrices, %s: %d cases\n", name.c_str(), n_cases);
}

}  // namespace

void test_fused_ops() {
    for (const mobilellm::instruction_set & set : mobilellm::instruction_sets()) {
        test(set.ops, set.products, set.name);
    }
}
