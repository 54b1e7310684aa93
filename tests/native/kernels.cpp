// Packing and every kernel this machine runs, against the scalar twin, and the twin against ggml's own rows in
// doubles. Prints a line for each set of kernels; the first mismatch ends it with exit code 1. `kernels emulated`
// leaves out what needs a processor's own speed.

#include "dispatch.h"
#include "random_numbers.h"
#include "streaming.h"

#include "ggml.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

using namespace mobilellm;

void test_fused_ops();  // fused_ops.cpp

namespace {

int uniform(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(generator);
}

float normal() {
    return std::normal_distribution<float>()(generator);
}

[[noreturn]] void fail(const std::string & what) {
    std::printf("FAILED: %s\n", what.c_str());
    std::exit(1);
}

// Memory on 64 bytes that ends where it ends, so that AddressSanitizer sees a read too far.
struct aligned_free {
    void operator()(uint8_t * memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

using aligned_memory = std::unique_ptr<uint8_t[], aligned_free>;

aligned_memory aligned(size_t size) {
    aligned_memory memory(static_cast<uint8_t *>(::operator new[](size, std::align_val_t(64))));
    std::memset(memory.get(), 0xA5, size);
    return memory;
}

// A type's block in GGUF: its fp16 numbers one after the other from byte `halves` on, and the bytes that smaller scales
// take.
struct block_shape {
    ggml_type type;
    size_t    n_halves;
    size_t    halves;
    size_t    n_subs;
    size_t    subs;

    int64_t columns() const { return ggml_blck_size(type); }

    size_t bytes() const { return ggml_type_size(type); }
};

const instruction_set & scalar = instruction_sets().back();

const block_shape SHAPES[] = {
    { GGML_TYPE_Q4_0, 1, 0, 0, 0 },   { GGML_TYPE_Q8_0, 1, 0, 0, 0 },   { GGML_TYPE_Q2_0, 1, 0, 0, 0 },
    { GGML_TYPE_Q4_1, 2, 0, 0, 0 },   { GGML_TYPE_Q5_0, 1, 0, 0, 0 },   { GGML_TYPE_Q5_1, 2, 0, 0, 0 },
    { GGML_TYPE_IQ4_NL, 1, 0, 0, 0 }, { GGML_TYPE_IQ4_XS, 1, 0, 6, 2 }, { GGML_TYPE_Q3_K, 1, 108, 12, 96 },
    { GGML_TYPE_Q4_K, 2, 0, 12, 4 },  { GGML_TYPE_Q5_K, 2, 0, 12, 4 },  { GGML_TYPE_Q6_K, 1, 208, 16, 192 },
};

// What fills weights and activations. Scales of random bits are fp16 without infinities and NaNs.
enum class filling { ordinary, random_bits, extremes, zero_scales, denormals, huge, integers };

const filling FILLINGS[] = { filling::ordinary,  filling::random_bits, filling::extremes, filling::zero_scales,
                             filling::denormals, filling::huge,        filling::integers };

uint16_t scale_bits(filling f) {
    const bool sign = uniform(0, 1);
    switch (f) {
        case filling::ordinary:
        case filling::extremes:
            return ggml_fp32_to_fp16(0.02f * normal());
        case filling::random_bits:
            return uint16_t(sign << 15 | uniform(0, 0x7BFF));
        case filling::zero_scales:
            return uniform(0, 3) ? uint16_t(sign << 15) : ggml_fp32_to_fp16(0.02f);
        case filling::denormals:
            return uint16_t(sign << 15 | uniform(1, 0x3FF));
        case filling::huge:
            return uint16_t(sign << 15 | 0x7BFF);
        default:
            return ggml_fp32_to_fp16(1.0f);
    }
}

std::vector<uint8_t> random_rows(const block_shape & shape, int64_t n_cols, int64_t n_rows, filling f) {
    std::vector<uint8_t> rows(n_cols / shape.columns() * n_rows * shape.bytes());
    for (size_t at = 0; at < rows.size(); at += shape.bytes()) {
        for (size_t i = 0; i < shape.bytes(); ++i) {
            const uint8_t ends[] = { 0x00, 0xFF, 0x80, 0x7F, 0x81, 0x0F, 0xF0 };
            rows[at + i]         = f == filling::extremes || f == filling::huge ? ends[uniform(0, 6)] : uniform(0, 255);
        }
        if (f == filling::extremes && uniform(0, 1)) {  // a whole block of one value
            std::memset(&rows[at], rows[at], shape.bytes());
        }
        for (size_t i = 0; f == filling::integers && i < shape.n_subs; ++i) {
            rows[at + shape.subs + i] &= 3;  // so that sums stay exact
        }
        for (size_t i = 0; i < shape.n_halves; ++i) {
            uint16_t scale = scale_bits(f);
            if (f == filling::huge && shape.n_subs) {
                scale -= 5 << 10;  // in the exponent: sums stay finite
            }
            std::memcpy(&rows[at + shape.halves + 2 * i], &scale, 2);
        }
    }
    return rows;
}

std::vector<float> random_input(int64_t n, filling f) {
    std::vector<float> x(n);
    const float        sign = uniform(0, 1) ? 1.0f : -1.0f;
    for (int64_t i = 0; i < n; ++i) {
        switch (f) {
            case filling::ordinary:
                x[i] = normal();
                break;
            case filling::random_bits:
                x[i] = std::ldexp(normal(), uniform(-30, 30));
                break;
            case filling::extremes:  // all activations ±127, whole blocks of one sign among them
                x[i] = i / BLOCK % 3 == 0 ? sign : i / BLOCK % 3 == 1 ? -sign : uniform(0, 1) ? 1.0f : -1.0f;
                break;
            case filling::zero_scales:
                x[i] = i / BLOCK % 2 ? normal() : 0.0f * sign;
                break;
            case filling::denormals:
                x[i] = std::ldexp(normal(), i / BLOCK % 2 ? uniform(-149, -120) : -101);
                break;
            case filling::huge:
                x[i] = 1e27f * normal();
                break;
            default:  // integers up to 127, the largest in every block: scale 1
                x[i] = i % BLOCK == 7 ? 127.0f : float(uniform(-127, 127));
        }
    }
    return x;
}

std::vector<uint8_t> quantized(const instruction_set & k, const std::vector<float> & x, int64_t n_cols) {
    std::vector<uint8_t> q(x.size() / n_cols * activation_size(n_cols));
    for (size_t t = 0; t < x.size() / n_cols; ++t) {
        k.products.quantize(&x[t * n_cols], n_cols, reinterpret_cast<activations *>(&q[t * activation_size(n_cols)]));
    }
    return q;
}

// The sum of a row's weights times a token, of each row and token.
std::vector<double> sums(const std::vector<float> & w, const std::vector<uint8_t> & q, int64_t n_cols, int64_t n_rows,
                         int64_t n_tokens, bool absolute) {
    std::vector<double> found(n_rows * n_tokens);
    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * a = reinterpret_cast<const activations *>(&q[t * activation_size(n_cols)]);
        for (int64_t r = 0; r < n_rows; ++r) {
            double sum = 0;
            for (int64_t c = 0; c < n_cols; ++c) {
                const double term = double(w[r * n_cols + c]) * a[c / BLOCK].q[c % BLOCK] * a[c / BLOCK].d;
                sum += absolute ? std::fabs(term) : term;
            }
            found[t * n_rows + r] = sum;
        }
    }
    return found;
}

std::vector<float> floats(const block_shape & shape, const std::vector<uint8_t> & rows) {
    std::vector<float> w(rows.size() / shape.bytes() * shape.columns());
    ggml_get_type_traits(shape.type)->to_float(rows.data(), w.data(), w.size());
    return w;
}

// What the error of a weight is held against: its size, or where it is a sum with a minimum that of both.
std::vector<float> sizes(const block_shape & shape, const std::vector<uint8_t> & rows) {
    std::vector<float> size = floats(shape, rows);
    if (shape.n_halves == 2) {
        std::vector<uint8_t> without = rows;  // quants, each block begins with the rest
        const size_t         rest    = shape.n_subs ? shape.subs + shape.n_subs : 4;
        for (size_t at = 0; at < rows.size(); at += shape.bytes()) {
            std::memset(&without[at + rest], 0, shape.bytes() - rest);
        }
        const std::vector<float> least = floats(shape, without);
        for (size_t i = 0; i < size.size(); ++i) {
            size[i] = std::fabs(size[i] - least[i]) + std::fabs(least[i]);
        }
    }
    return size;
}

double worst = 0;  // error of the set under test, relative to Σ |terms|

void compare(const std::string & what, const float * got, const float * want, const double * scale, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        if (std::isnan(want[i]) && std::isnan(got[i])) {
            continue;
        }
        if (got[i] == want[i]) {
            continue;
        }
        const double error = std::fabs(double(got[i]) - want[i]) / (scale[i] + DBL_MIN);
        // below FLT_MIN floats have fewer digits
        if (!(error <= 1e-5) && !(std::fabs(double(got[i]) - want[i]) <= 1e-38)) {
            fail(what + ": " + std::to_string(got[i]) + " instead of " + std::to_string(want[i]) + " at " +
                 std::to_string(i) + ", relative " + std::to_string(error));
        }
        if (scale[i] > 1e-30) {
            worst = std::max(worst, error);
        }
    }
}

void check(const instruction_set & k, const block_shape & shape, int64_t n_cols, int64_t n_rows, int64_t n_tokens,
           filling f) {
    const std::string what = std::string(k.name) + " " + ggml_type_name(shape.type) + " " + std::to_string(n_cols) +
                             "x" + std::to_string(n_rows) + ", " + std::to_string(n_tokens) + " tokens, filling " +
                             std::to_string(int(f));
    const size_t row_size = n_cols / shape.columns() * shape.bytes();
    const auto   rows     = random_rows(shape, n_cols, n_rows, f);

    const auto   memory = aligned(packed_size(shape.type, n_cols, n_rows));
    const matrix m{ shape.type, n_cols, n_rows, memory.get() };
    // in two parts, as two threads would
    pack(shape.type, n_cols, n_rows, rows.data(), m.n_groups() / 2, m.n_groups(), memory.get());
    pack(shape.type, n_cols, n_rows, rows.data(), 0, m.n_groups() / 2, memory.get());

    const std::vector<float> w = floats(shape, rows);
    std::vector<uint8_t>     row(row_size);
    std::vector<float>       values(n_cols);
    for (int64_t r = 0; r < n_rows; ++r) {
        unpack(m, r, row.data());
        unpack_row(m, r, values.data());
        if (std::memcmp(row.data(), &rows[r * row_size], row_size) != 0 ||
            std::memcmp(values.data(), &w[r * n_cols], n_cols * sizeof(float)) != 0) {
            fail(what + ": row " + std::to_string(r) + " is not what was packed");
        }
    }

    const auto x = random_input(n_cols * n_tokens, f);
    const auto q = quantized(scalar, x, n_cols);
    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * want = reinterpret_cast<const activations *>(&q[t * activation_size(n_cols)]);
        const auto   got  = quantized(k, { x.begin() + t * n_cols, x.begin() + (t + 1) * n_cols }, n_cols);
        if (std::memcmp(got.data(), want, n_cols / BLOCK * sizeof(activations)) != 0) {
            fail(what + ": activations differ");
        }
    }
    const auto * a = reinterpret_cast<const activations *>(q.data());

    const auto         scale = sums(sizes(shape, rows), q, n_cols, n_rows, n_tokens, true);
    std::vector<float> want(n_rows * n_tokens, -1.0f);
    scalar.products.matmul(m, 0, m.n_groups(), a, n_tokens, want.data(), n_rows, nullptr, nullptr);

    if (&k.products == &scalar.products) {  // the twin itself: against doubles over ggml's floats
        const auto exact = sums(w, q, n_cols, n_rows, n_tokens, false);
        const auto same  = std::vector<float>(exact.begin(), exact.end());
        compare(what + ", doubles", want.data(), same.data(), scale.data(), n_rows * n_tokens);
    }

    // groups in two parts; past n_rows nothing may be written
    std::vector<float> got(n_rows * n_tokens, -1.0f);
    const int64_t      middle = m.n_groups() / 2;
    k.products.matmul(m, middle, m.n_groups(), a, n_tokens, got.data() + middle * GROUP, n_rows, rows.data(), nullptr);
    k.products.matmul(m, 0, middle, a, n_tokens, got.data(), n_rows, nullptr, m.data);
    compare(what + ", matmul", got.data(), want.data(), scale.data(), n_rows * n_tokens);
    if (f == filling::integers && n_cols <= 512 && got != want) {
        fail(what + ": integers are not exact");
    }

    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * one = reinterpret_cast<const activations *>(&q[t * activation_size(n_cols)]);

        std::vector<float> y(n_rows, -1.0f);
        k.products.matmul(m, 0, m.n_groups(), one, 1, y.data(), n_rows, nullptr, nullptr);
        if (std::memcmp(y.data(), &got[t * n_rows], n_rows * sizeof(float)) != 0) {
            fail(what + ": a token alone differs");
        }
    }
}

// Prefetching changes no bit: every cache, distances inside a row, past the row and past the matrix, with and without
// something that is read next or later.
void check_streaming(const instruction_set & k) {
    for (const block_shape & shape : SHAPES) {
        const int64_t n_cols = shape.columns() > 64 ? 768 : 576, n_rows = 70, n_tokens = 7;
        const auto    rows   = random_rows(shape, n_cols, n_rows, filling::ordinary);
        const auto    memory = aligned(packed_size(shape.type, n_cols, n_rows));
        matrix        m{ shape.type, n_cols, n_rows, memory.get() };
        pack(shape.type, n_cols, n_rows, rows.data(), 0, m.n_groups(), memory.get());
        const auto q = quantized(k, random_input(n_cols * n_tokens, filling::ordinary), n_cols);

        const auto product = [&](int64_t n, const void * next, const uint8_t * later) {
            std::vector<float> y(n * n_rows);
            k.products.matmul(m, 0, m.n_groups(), reinterpret_cast<const activations *>(q.data()), n, y.data(), n_rows,
                              next, later);
            return y;
        };
        for (const int64_t n : { int64_t(1), n_tokens }) {
            m.stream        = {};
            const auto want = product(n, nullptr, nullptr);
            for (const auto hint : { streaming::none, streaming::nta, streaming::t2, streaming::t1, streaming::t0 }) {
                for (const int64_t ahead : { 0, 1, 2, 4, 8, 1000 }) {
                    m.stream = { hint, ahead };
                    if (product(n, nullptr, nullptr) != want || product(n, rows.data(), m.data) != want) {
                        fail(std::string(k.name) + " " + ggml_type_name(shape.type) + ": hint " + std::to_string(hint) +
                             ", " + std::to_string(ahead) + " · 64 columns ahead change the result");
                    }
                }
            }
        }
    }
}

// The choice by measurement: kept once made, none where there is too little to tell, and what is forced goes before.
void check_choice() {
    const auto is = [](const streaming & a, const streaming & b) { return a.hint == b.hint && a.ahead == b.ahead; };

    const int64_t       n_cols = 576, n_rows = 1536;
    const size_t        size   = packed_size(GGML_TYPE_Q4_0, n_cols, n_rows);
    const auto          memory = aligned(64 * size);
    std::vector<matrix> weights;
    for (int i = 0; i < 64; ++i) {
        weights.push_back({ GGML_TYPE_Q4_0, n_cols, n_rows, memory.get() + i * size });
    }
    const std::vector<matrix> few(weights.begin(), weights.begin() + 8);
    if (!is(choose_streaming(few, 1.0), {}) || !is(choose_streaming(weights, 0.0), {}) || streaming_text() != "") {
        fail("a choice without a measurement");
    }
    streaming chosen;
    for (int i = 0; i < 100 && streaming_text() == ""; ++i) {  // a busy machine may not get through in time
        chosen = choose_streaming(weights, 1.0);
    }
#ifdef __SANITIZE_ADDRESS__
    const bool too_slow = streaming_text() == "";  // to be measured in the time that there is
#else
    const bool too_slow = false;
#endif
    if ((!too_slow && streaming_text().find("q4_0 from 16 MiB: ") != 0) ||
        !is(choose_streaming(weights, 0.0), chosen)) {
        fail("no choice is kept: " + streaming_text());
    }
    std::printf("streaming: %s\n", streaming_text().c_str());

    force_streaming({ streaming::nta, 3 });
    if (!is(choose_streaming(few, 0.0), { streaming::nta, 3 }) ||
        streaming_text() != "forced: nta, 192 columns ahead") {
        fail("what is forced is not taken: " + streaming_text());
    }
    measure_streaming();
    if (!is(choose_streaming(few, 0.0), {}) || streaming_text() != "") {
        fail("what was forced stays");
    }
}

void check_not_finite(const instruction_set & k) {
    for (const float bad : { NAN, -NAN, INFINITY, -INFINITY }) {
        for (int64_t at = 0; at < 64; ++at) {
            std::vector<float> x(64, 0.5f);
            x[at] = bad;
            std::vector<uint8_t> q(activation_size(64));
            k.products.quantize(x.data(), 64, reinterpret_cast<activations *>(q.data()));
            const auto * block = reinterpret_cast<const activations *>(q.data()) + at / BLOCK;
            const auto * other = reinterpret_cast<const activations *>(q.data()) + (1 - at / BLOCK);
            for (int64_t i = 0; i < BLOCK; ++i) {
                if (block->q[i] != 0 || other->q[i] != 127) {
                    fail(std::string(k.name) + ": a value that is not finite leaks");
                }
            }
            if (!std::isnan(block->d) || block->minus_8_sum != 0 || other->minus_8_sum != -8 * 127 * 32) {
                fail(std::string(k.name) + ": a value that is not finite is lost");
            }
        }
    }
}

std::vector<int64_t> first(std::vector<int64_t> values, size_t n) {
    values.resize(n);
    return values;
}

void check_all(const instruction_set & k, bool emulated) {
    worst       = 0;
    int n_cases = 0;
    for (const block_shape & shape : SHAPES) {
        for (const filling f : FILLINGS) {
            const int64_t              least  = std::max<int64_t>(shape.columns(), 64);
            const std::vector<int64_t> widths = { 3 * least, least, 2 * least, 9 * 64 / least * least };
            for (const int64_t n_cols : first(widths, emulated ? 1 : 4)) {
                for (const int64_t n_rows : first({ 40, 17, 1, 15, 16 }, emulated ? 2 : 5)) {
                    for (const int64_t n_tokens : { 1, 2, 3, 5, 8, 22 }) {
                        check(k, shape, n_cols, n_rows, n_tokens, f);
                        ++n_cases;
                    }
                }
            }
            // the widths of the family, and token counts around every tile
            for (const int64_t n_cols :
                 first({ 6144, 960, 1024, 1152, 1280, 1536, 1600, 2048, 2560, 3072, 3584, 4352 }, emulated ? 1 : 12)) {
                if (packable(shape.type, n_cols) && (f == filling::ordinary || f == filling::extremes)) {
                    check(k, shape, n_cols, 33, 2, f);
                    ++n_cases;
                }
            }
            for (int64_t n_tokens = 0; n_tokens <= (emulated ? 9 : 40); ++n_tokens) {
                check(k, shape, std::max<int64_t>(128, least), 20, n_tokens, f);
                ++n_cases;
            }
        }
    }
    check(k, SHAPES[0], 9600, 17, 72, filling::ordinary);  // more tokens than a second-level cache holds
    ++n_cases;
    check_not_finite(k);
    check_streaming(k);
    std::printf("%s: %d cases, largest error %.1e\n", k.name, n_cases, worst);
}

void check_types() {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        const auto is   = [&](const block_shape & shape) { return shape.type == type; };
        const auto ours = std::find_if(std::begin(SHAPES), std::end(SHAPES), is);
        for (const int64_t n_cols : { -256, -64, 0, 32, 63, 64, 96, 128, 256, 576, 768 }) {
            const bool known = is_float(ggml_type(type)) || (ours != std::end(SHAPES) && n_cols % ours->columns() == 0);
            const bool fits  = known && n_cols > 0 && n_cols % 64 == 0;
            if (packable(ggml_type(type), n_cols) != fits) {
                fail("packable");
            }
            if (fits && packed_size(ggml_type(type), n_cols, 64) != 64 * ggml_row_size(ggml_type(type), n_cols)) {
                fail("packed weights take more memory");
            }
        }
    }
}

}  // namespace

// kernels_test [emulated [PART]]: fewer cases; PART is a set of kernels, or "between" for what is between matrices.
int main(int argc, char ** argv) {
    const bool        emulated = argc > 1 && std::string(argv[1]) == "emulated";
    const std::string part     = argc > 2 ? argv[2] : "";
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // what was found so far, whatever comes
    check_types();
    for (const instruction_set & k : instruction_sets()) {
        if (part.empty() || part == k.name) {
            check_all(k, emulated);
        }
    }
    if (!emulated) {
        check_choice();
    }
    if (part.empty() || part == "between") {
        test_fused_ops();
    }
    std::printf("best: %s\n", best().name);
    return 0;
}
