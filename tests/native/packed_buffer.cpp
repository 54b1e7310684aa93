// The buffer type of packed weights as ggml's scheduler sees it: which operations it takes, what they give compared
// with ggml's own kernels, on any number of threads. Prints a line; the first mismatch ends it with exit code 1.

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace {

std::mt19937 generator(1);
int          n_cases = 0;

void check(bool right, const std::string & what) {
    ++n_cases;
    if (!right) {
        std::printf("FAILED: %s\n", what.c_str());
        std::exit(1);
    }
}

std::vector<float> normals(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float>              x(n);
    std::generate(x.begin(), x.end(), [&] { return normal(generator); });
    return x;
}

struct ggml_deleter {
    void operator()(ggml_context * ctx) const { ggml_free(ctx); }

    void operator()(ggml_backend_buffer * buffer) const { ggml_backend_buffer_free(buffer); }

    void operator()(ggml_backend * backend) const { ggml_backend_free(backend); }
};

using context = std::unique_ptr<ggml_context, ggml_deleter>;
using buffer  = std::unique_ptr<ggml_backend_buffer, ggml_deleter>;

context new_context() {
    return context(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
}

buffer allocate(const context & ctx, ggml_backend_buffer_type_t type) {
    return buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), type));
}

ggml_backend_buffer_type_t packed_type() {
    const auto dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts"));
    for (ggml_backend_buffer_type_t * type = get(dev); *type; ++type) {
        if (std::strcmp(ggml_backend_buft_name(*type), "CPU_MOBILELLM") == 0) {
            return *type;
        }
    }
    return nullptr;
}

// The same matrix twice: packed, and as ggml has it.
struct weights {
    weights(ggml_backend_buffer_type_t packed_type, ggml_type type, int64_t n_cols, int64_t n_rows) {
        packed = ggml_new_tensor_2d(packed_context.get(), type, n_cols, n_rows);
        plain  = ggml_new_tensor_2d(plain_context.get(), type, n_cols, n_rows);
        ggml_set_name(packed, "token_embd.weight");
        packed_buffer = allocate(packed_context, packed_type);
        plain_buffer  = allocate(plain_context, ggml_backend_cpu_buffer_type());

        const std::vector<float> x = normals(n_cols * n_rows);
        std::vector<uint8_t>     rows(ggml_nbytes(packed));
        ggml_quantize_chunk(type, x.data(), rows.data(), 0, n_rows, n_cols, nullptr);
        ggml_backend_tensor_set(packed, rows.data(), 0, rows.size());
        ggml_backend_tensor_set(plain, rows.data(), 0, rows.size());
    }

    context       packed_context = new_context(), plain_context = new_context();
    ggml_tensor * packed;
    ggml_tensor * plain;
    buffer        packed_buffer, plain_buffer;
};

void test_support(ggml_backend_t backend, const weights & w, const std::string & name) {
    const context  ctx   = new_context();
    ggml_context * c     = ctx.get();
    ggml_tensor *  input = ggml_new_tensor_2d(c, GGML_TYPE_F32, w.packed->ne[0], 3);
    ggml_tensor *  other = ggml_new_tensor_2d(c, GGML_TYPE_F32, 3, w.packed->ne[0]);
    ggml_tensor *  ids   = ggml_new_tensor_1d(c, GGML_TYPE_I32, 2);
    const bool     fits  = w.packed->ne[1] >= 16;

    check(ggml_backend_supports_op(backend, ggml_mul_mat(c, w.packed, input)) == fits, name + ": MUL_MAT");
    check(ggml_backend_supports_op(backend, ggml_get_rows(c, w.packed, ids)) == fits, name + ": GET_ROWS");

    const std::pair<const char *, ggml_tensor *> refused[] = {
        { "MUL_MAT of columns", ggml_mul_mat(c, w.packed, ggml_transpose(c, other)) },
        { "MUL_MAT of F16", ggml_mul_mat(c, w.packed, ggml_new_tensor_1d(c, GGML_TYPE_F16, w.packed->ne[0])) },
        { "CPY", ggml_cast(c, w.packed, GGML_TYPE_F32) },
        { "CONT", ggml_cont(c, w.packed) },
        { "SCALE", ggml_scale(c, w.packed, 2.0f) },
        { "SUM_ROWS", ggml_sum_rows(c, w.packed) },
        { "MUL_MAT as second source", ggml_mul_mat(c, input, w.packed) },
    };
    for (const auto & [what, op] : refused) {
        check(!ggml_backend_supports_op(backend, op), name + ": " + what + " is not refused");
    }
}

std::vector<float> computed(ggml_backend_t backend, int n_threads, ggml_tensor * weight, const std::vector<float> & x) {
    const context ctx    = new_context();
    ggml_tensor * input  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, weight->ne[0], x.size() / weight->ne[0]);
    ggml_tensor * output = ggml_mul_mat(ctx.get(), weight, input);
    ggml_cgraph * graph  = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, output);
    const buffer memory = allocate(ctx, ggml_backend_cpu_buffer_type());

    ggml_backend_tensor_set(input, x.data(), 0, x.size() * sizeof(float));
    ggml_backend_cpu_set_n_threads(backend, n_threads);
    check(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, "a graph fails");
    std::vector<float> y(ggml_nelements(output));
    ggml_backend_tensor_get(output, y.data(), 0, y.size() * sizeof(float));
    return y;
}

void test_products(ggml_backend_t backend, const weights & w, const std::string & name) {
    for (const int n_tokens : { 1, 4, 5, 37 }) {
        const std::vector<float> x    = normals(w.packed->ne[0] * n_tokens);
        const std::vector<float> want = computed(backend, 1, w.plain, x);
        const std::vector<float> one  = computed(backend, 1, w.packed, x);

        double error = 0.0, all = 0.0;
        for (size_t i = 0; i < want.size(); ++i) {
            error += std::pow(double(one[i]) - want[i], 2.0);
            all += std::pow(double(want[i]), 2.0);
        }
        check(error <= 1e-4 * all, name + ": MUL_MAT differs from ggml's");  // scales of activations: fp16 there
        for (const int n_threads : { 2, 5, 8 }) {
            check(computed(backend, n_threads, w.packed, x) == one, name + ": threads change bits");
        }
    }
}

}  // namespace

int main() {
    const ggml_backend_buffer_type_t type = packed_type();
    if (!type) {
        std::printf("no kernels for this processor\n");
        return 0;
    }
    const std::unique_ptr<ggml_backend, ggml_deleter> backend(ggml_backend_cpu_init());
    for (const ggml_type kind : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q2_0 }) {
        for (const int64_t n_rows : { 1, 15, 16, 33, 200 }) {
            const std::string name = std::string(ggml_type_name(kind)) + ", " + std::to_string(n_rows) + " rows";
            const weights     w(type, kind, 192, n_rows);
            test_support(backend.get(), w, name);
            if (n_rows >= 16) {
                test_products(backend.get(), w, name);
            }
        }
    }
    std::printf("packed: %d cases\n", n_cases);
}
