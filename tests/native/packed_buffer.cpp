// The buffer type of packed weights as ggml's scheduler sees it: which operations it takes, what they give compared
// with ggml's own kernels, on any number of threads; and the step of fused.h on any number of threads. Prints a line;
// the first mismatch ends it with exit code 1.

#include "fused.h"
#include "random_numbers.h"
#include "thread_limit.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

int n_cases = 0;

void check(bool right, const std::string & what) {
    ++n_cases;
    if (!right) {
        std::printf("FAILED: %s\n", what.c_str());
        std::exit(1);
    }
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

// A buffer that several threads fill. Its matrices are set by threads of their own, the last twice; and a buffer freed
// before it is full.
void test_filling(ggml_backend_buffer_type_t packed_type) {
    constexpr int64_t n_cols = 640, n_rows = 5100, n_tensors = 6;

    const auto create = [&](const context & ctx, std::vector<ggml_tensor *> & tensors) {
        for (int i = 0; i < n_tensors; ++i) {
            tensors.push_back(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_Q8_0, n_cols, n_rows + i));
        }
        return allocate(ctx, packed_type);
    };
    for (const int n_set : { 0, 1, int(n_tensors) }) {
        const context                     ctx = new_context();
        std::vector<ggml_tensor *>        tensors;
        const buffer                      memory = create(ctx, tensors);
        std::vector<std::vector<uint8_t>> rows;
        std::vector<std::thread>          threads;
        for (int i = 0; i < n_set; ++i) {
            rows.emplace_back(ggml_nbytes(tensors[i]));
            std::generate(rows[i].begin(), rows[i].end(), [] { return uint8_t(generator()); });
        }
        for (int i = 0; i < n_set; ++i) {
            const auto set = [&, i] { ggml_backend_tensor_set(tensors[i], rows[i].data(), 0, rows[i].size()); };
            threads.emplace_back(set);
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        if (n_set == n_tensors) {
            std::reverse(rows[5].begin(), rows[5].end());
            ggml_backend_tensor_set(tensors[5], rows[5].data(), 0, rows[5].size());
        }
        for (int i = 0; i < n_set; ++i) {
            std::vector<uint8_t> got(rows[i].size());
            ggml_backend_tensor_get(tensors[i], got.data(), 0, got.size());
            check(got == rows[i], "a matrix of a large buffer is not what was set");
        }
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
        // scales of activations: fp16 there, and with K-quants one for 256
        const double most = ggml_blck_size(w.packed->type) > 64 ? 3e-4 : 1e-4;
        check(error <= most * all, name + ": MUL_MAT differs from ggml's");
        for (const int n_threads : { 2, 5, 8 }) {
            check(computed(backend, n_threads, w.packed, x) == one, name + ": threads change bits");
        }
    }
}

// Two layers, one with the norm of q and k, over a cache of random cells; some tokens, of which every third is output.
struct small_model {
    static constexpr int64_t n_embd = 128, n_head = 4, n_head_kv = 2, n_embd_head = 32, n_ff = 192, n_cells = 4352;

    small_model(ggml_backend_buffer_type_t type, int64_t n_tokens) {
        const int64_t n_outputs = (n_tokens + 2) / 3;
        const int64_t n_kv      = n_head_kv * n_embd_head;
        for (int il = 0; il < 2; ++il) {
            fused_layer_of(il ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_0, n_kv);
        }
        fused.output_norm = vector(GGML_TYPE_F32, n_embd);
        embedding         = ggml_new_tensor_2d(rest.get(), GGML_TYPE_F32, n_embd, n_tokens);
        output            = ggml_new_tensor_2d(rest.get(), GGML_TYPE_F32, n_embd, n_outputs);
        position          = vector(GGML_TYPE_I32, n_tokens);
        cell              = vector(GGML_TYPE_I64, n_tokens);
        mask              = ggml_new_tensor_2d(rest.get(), GGML_TYPE_F32, n_cells, n_tokens);
        outputs           = vector(GGML_TYPE_I32, n_outputs);
        numbers           = vector(GGML_TYPE_I32, n_tokens + n_cells);
        buffers.push_back(allocate(matrices, type));
        buffers.push_back(allocate(rest, ggml_backend_cpu_buffer_type()));
        for (ggml_context * ctx : { matrices.get(), rest.get() }) {
            for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
                fill(t);
            }
        }
        ggml_tensor * sources[] = { embedding, position, outputs, numbers, cell, mask };
        std::copy(sources, sources + 6, output->src);
        for (int32_t i = 0; i < n_cells; ++i) {
            cell_positions()[i] = i;
        }
        std::fill_n(static_cast<int32_t *>(numbers->data), n_tokens, 7);
        for (int32_t i = 0; i < n_outputs; ++i) {
            static_cast<int32_t *>(outputs->data)[i] = 3 * i;
        }

        fused.output           = nullptr;
        fused.n_tokens         = n_tokens;
        fused.n_seqs           = 1;
        fused.n_streams        = 1;
        fused.n_outputs        = n_outputs;
        fused.n_embd           = n_embd;
        fused.n_ff             = n_ff;
        fused.n_head           = n_head;
        fused.n_head_kv        = n_head_kv;
        fused.n_embd_head      = n_embd_head;
        fused.caches           = { { n_cells, n_cells } };
        fused.eps              = 1e-5f;
        fused.kq_scale         = 1.0f / std::sqrt(float(n_embd_head));
        fused.rope_freq_base   = 1e4f;
        fused.rope_freq_scale  = 1.0f;
        fused.rope_attn_factor = 1.0f;
        fused.rope_ext_factor  = 0.0f;
        fused.rope_factors     = nullptr;
        fused.k_rotation       = 0;
        fused.v_rotation       = 0;
    }

    ggml_tensor * vector(ggml_type type, int64_t n) { return ggml_new_tensor_1d(rest.get(), type, n); }

    void fused_layer_of(ggml_type type, int64_t n_kv) {
        const auto matrix = [&](int64_t n_cols, int64_t n_rows) {
            return ggml_new_tensor_2d(matrices.get(), type, n_cols, n_rows);
        };
        const auto cache = [&] {
            return ggml_new_tensor_3d(rest.get(), GGML_TYPE_F16, n_embd_head, n_head_kv, n_cells);
        };
        const bool norm = type == GGML_TYPE_Q8_0;
        fused.layers.push_back({ vector(GGML_TYPE_F32, n_embd), matrix(n_embd, n_embd), matrix(n_embd, n_kv),
                                 matrix(n_embd, n_kv), matrix(n_embd, n_embd), vector(GGML_TYPE_F32, n_embd),
                                 matrix(n_embd, n_ff), matrix(n_embd, n_ff), matrix(n_ff, n_embd), cache(), cache(),
                                 nullptr, true, norm });
    }

    static void fill(ggml_tensor * t) {
        std::vector<float>   x = normals(ggml_nelements(t));
        std::vector<uint8_t> rows(ggml_nbytes(t));
        if (t->type == GGML_TYPE_F32) {
            std::memcpy(rows.data(), x.data(), rows.size());
        } else if (t->type == GGML_TYPE_F16) {
            ggml_fp32_to_fp16_row(x.data(), reinterpret_cast<ggml_fp16_t *>(rows.data()), x.size());
        } else if (ggml_is_quantized(t->type)) {
            std::for_each(x.begin(), x.end(), [](float & value) { value *= 0.05f; });
            ggml_quantize_chunk(t->type, x.data(), rows.data(), 0, t->ne[1], t->ne[0], nullptr);
        }
        ggml_backend_tensor_set(t, rows.data(), 0, rows.size());
    }

    context                matrices = new_context(), rest = new_context();
    std::vector<buffer>    buffers;
    mobilellm::fused_model fused;
    ggml_tensor *          embedding;
    ggml_tensor *          output;
    ggml_tensor *          position;
    ggml_tensor *          cell;
    ggml_tensor *          mask;
    ggml_tensor *          outputs;
    ggml_tensor *          numbers;  // the sequence of each token, then the position in each cell

    int32_t * cell_positions() const { return static_cast<int32_t *>(numbers->data) + numbers->ne[0] - n_cells; }

    // What lies in two cells changes places.
    void exchange(int64_t a, int64_t b) {
        int32_t * positions = cell_positions();
        std::swap(positions[a], positions[b]);
        for (const mobilellm::fused_layer & l : fused.layers) {
            for (const ggml_tensor * cache : { l.k, l.v }) {
                auto * cells = static_cast<uint8_t *>(cache->data);
                std::swap_ranges(cells + a * cache->nb[2], cells + (a + 1) * cache->nb[2], cells + b * cache->nb[2]);
            }
        }
    }
};

// The step's result, on so many threads, from an output and cells to write that hold NaN.
std::vector<float> run(const mobilellm::fused_interface & kept, mobilellm::fused_step * step, const small_model & model,
                       int n_threads) {
    constexpr int64_t row = small_model::n_embd_head * small_model::n_head_kv;

    float *       y = static_cast<float *>(model.output->data);
    const int64_t n = ggml_nelements(model.output);
    std::fill(y, y + n, NAN);
    for (const mobilellm::fused_layer & l : model.fused.layers) {
        for (const ggml_tensor * cache : { l.k, l.v }) {
            for (int64_t t = 0; t < model.fused.n_tokens; ++t) {
                auto * cell = static_cast<uint16_t *>(cache->data) + static_cast<int64_t *>(model.cell->data)[t] * row;
                std::fill(cell, cell + row, uint16_t(0x7E00));
            }
        }
    }
    std::vector<std::thread> threads;
    for (int ith = 0; ith < n_threads; ++ith) {
        threads.emplace_back([&, ith] { kept.run(model.output, ith, n_threads, step); });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    return { y, y + n };
}

void test_fused_step(ggml_backend_buffer_type_t type, int64_t n_tokens) {
    const auto dev  = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto kept = static_cast<const mobilellm::fused_interface *>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "mobilellm_fused"));
    check(kept != nullptr, "no fused step");

    small_model             model(type, n_tokens);
    mobilellm::fused_step * step = kept->create(model.fused);
    check(step != nullptr, "the fused step does not know the model");
    model.fused.n_seqs           = n_tokens;  // rows are shared
    mobilellm::fused_step * rows = kept->create(model.fused);

    // one shard of attention, some, as many as there can be, more cells than those hold by the least
    for (const int64_t n_seen : { int64_t(1), int64_t(70), int64_t(513), int64_t(1025), 4353 - n_tokens }) {
        float * mask = static_cast<float *>(model.mask->data);
        for (int64_t t = 0; t < n_tokens; ++t, mask += model.n_cells) {
            std::fill(mask, mask + model.n_cells, -INFINITY);
            std::fill(mask, mask + n_seen + t, 0.0f);
            static_cast<int64_t *>(model.cell->data)[t]     = n_seen / 2 + t;
            static_cast<int32_t *>(model.position->data)[t] = int32_t(n_seen + t);
        }
        const std::string        at  = std::to_string(n_tokens) + " tokens over " + std::to_string(n_seen) + " cells";
        const std::vector<float> one = run(*kept, step, model, 1);
        check(std::all_of(one.begin(), one.end(), [](float value) { return std::isfinite(value); }),
              "the fused step gives no numbers for " + at);
        for (const int n_threads : { 2, 3, 5, 8, 13 }) {
            check(run(*kept, step, model, n_threads) == one, "threads change bits of the fused step of " + at);
        }
        const std::vector<float> other = run(*kept, rows, model, 2);
        if (n_seen > 4) {
            model.exchange(0, n_seen / 2 - 1);
            check(run(*kept, step, model, 2) == one, "where cells lie changes bits of the fused step of " + at);
            check(run(*kept, rows, model, 2) == other, "where cells lie changes bits of the shared rows of " + at);
            model.exchange(0, n_seen / 2 - 1);
        }
        for (size_t first = 0; first < one.size(); first += model.n_embd) {
            double error = 0.0, all = 0.0;
            for (int64_t i = 0; i < model.n_embd; ++i) {
                error += std::pow(double(one[first + i]) - other[first + i], 2.0);
                all += std::pow(double(other[first + i]), 2.0);
            }
            check(error <= 0.05 * 0.05 * all, "rows shared or not make a difference to " + at);
        }
    }
    kept->destroy(rows);
    kept->destroy(step);
}

void test_thread_limit() {
    using namespace std::chrono_literals;

    mobilellm::thread_limit                    limit;
    mobilellm::thread_limit::clock::time_point now{};
    const auto step = [&](int n_threads, std::chrono::milliseconds wall) {  // of which the first works 1 ms
        limit.judge(n_threads, 1e-3, wall, now += wall);
    };
    check(limit.threads(now) >= 8, "a step gets fewer threads for no reason");
    step(8, 3ms);
    check(limit.threads(now) >= 8, "one late step is too few");
    step(8, 3ms);
    check(limit.threads(now) == 4 && limit.threads(now += 59ms) == 4, "late steps get half of the threads");
    check(limit.threads(now += 1ms) == 8, "more threads are tried again");
    step(8, 3ms);
    check(limit.threads(now) == 4, "and no longer, where that step is late");
    check(limit.threads(now += 60ms) == 8, "later once more");
    step(8, 2ms);
    check(limit.threads(now) == 16, "and more, where it is not");
    step(2, 9ms);
    check(limit.threads(now) == 1, "one step that is very late is enough");
}

}  // namespace

int main() {
    const ggml_backend_buffer_type_t type = packed_type();
    if (!type) {
        std::printf("no kernels for this processor\n");
        return 0;
    }
    const std::unique_ptr<ggml_backend, ggml_deleter> backend(ggml_backend_cpu_init());
    for (const ggml_type kind : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q2_0, GGML_TYPE_Q4_1, GGML_TYPE_Q6_K }) {
        for (const int64_t n_rows : { 1, 15, 16, 33, 200 }) {
            const std::string name = std::string(ggml_type_name(kind)) + ", " + std::to_string(n_rows) + " rows";
            const weights     w(type, kind, kind == GGML_TYPE_Q6_K ? 256 : 192, n_rows);
            test_support(backend.get(), w, name);
            if (n_rows >= 16) {
                test_products(backend.get(), w, name);
            }
        }
    }
    test_thread_limit();
    test_filling(type);
    for (const int64_t n_tokens : { 1, 3, 12, 13, 60 }) {
        test_fused_step(type, n_tokens);
    }
    std::printf("packed: %d cases\n", n_cases);
}
