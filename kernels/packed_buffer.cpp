#include "packed_buffer.h"

#include "dispatch.h"
#include "filling_threads.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "streaming.h"
#include "this_process.h"
#include "traits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mobilellm {

namespace {

// Up to so many tokens each thread quantizes the input for itself: cheaper than to meet at a barrier.
constexpr int64_t OWN_TOKENS = 4;

constexpr size_t BYTES_A_SHARE = 64 * 1024;  // that a thread packs before it takes the next
constexpr double CHOOSING      = 0.04;       // of the time that filling took, to choose how weights are read

bool fits(const ggml_tensor * tensor) {
    return (!is_float(tensor->type) || packs_floats(tensor->name)) && packable(tensor->type, tensor->ne[0]) &&
           tensor->ne[1] >= GROUP / 2 && ggml_is_matrix(tensor) && ggml_is_contiguous(tensor) && !tensor->view_src;
}

struct packed_buffer;

// What a packed tensor's `extra` points to.
struct packed_tensor : ggml::cpu::tensor_traits {
    packed_tensor(packed_buffer & owner, const matrix & m) : owner(owner), m(m) {}

    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = 0;
        if (op->op == GGML_OP_MUL_MAT) {
            const int64_t n_tokens = ggml_nrows(op->src[1]);
            size                   = input_size() * (n_tokens <= OWN_TOKENS ? n_threads * n_tokens : n_tokens) + 64;
        }
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (op->op == GGML_OP_MUL_MAT) {
            mul_mat(*params, op);
        } else {
            get_rows(*params, op);
        }
        return true;
    }

    // Bytes of a token as the matrix takes it.
    size_t input_size() const { return is_float(m.type) ? m.n_cols * sizeof(float) : activation_size(m.n_cols); }

    // Share ith of nth of the groups: which one begins it.
    int64_t first_group(int64_t ith, int64_t nth) const { return m.n_groups() * ith / nth; }

    void mul_mat(const ggml_compute_params & params, ggml_tensor * op);
    void get_rows(const ggml_compute_params & params, ggml_tensor * op) const;

    packed_buffer & owner;
    matrix          m;

    // the matrix that was multiplied after this one the last time: only says what to prefetch
    std::atomic<const packed_tensor *> next{ nullptr };
};

struct packed_buffer {
    uint8_t *                                   memory;
    size_t                                      size;
    std::vector<std::unique_ptr<packed_tensor>> tensors;
    std::atomic<packed_tensor *>                last{ nullptr };  // that was multiplied

    std::mutex                       filling;
    std::unique_ptr<filling_threads> fillers;
    const long                       process = this_process();  // in which the fillers run
    int64_t                          n_unset = 0;               // packed tensors without data

    std::chrono::steady_clock::time_point began = std::chrono::steady_clock::now();

    void choose_streaming();
};

// Of all matrices, now that they are packed.
void packed_buffer::choose_streaming() {
    const std::chrono::duration<double>      took = std::chrono::steady_clock::now() - began;
    std::map<ggml_type, std::vector<matrix>> by_type;
    for (const auto & tensor : tensors) {
        by_type[tensor->m.type].push_back(tensor->m);
    }
    for (const auto & [type, weights] : by_type) {
        const streaming chosen = mobilellm::choose_streaming(weights, CHOOSING * took.count() / by_type.size());
        for (const auto & tensor : tensors) {
            if (tensor->m.type == type) {
                tensor->m.stream = chosen;
            }
        }
    }
}

const float * row_of(const ggml_tensor * tensor, int64_t row) {
    const int64_t i1 = row % tensor->ne[1];
    const int64_t i2 = row / tensor->ne[1] % tensor->ne[2];
    const int64_t i3 = row / tensor->ne[1] / tensor->ne[2];

    const char * at =
        static_cast<const char *>(tensor->data) + i1 * tensor->nb[1] + i2 * tensor->nb[2] + i3 * tensor->nb[3];
    return reinterpret_cast<const float *>(at);
}

// Each row of the result is computed by one thread from beginning to end, so their number changes no bit of it.
void packed_tensor::mul_mat(const ggml_compute_params & params, ggml_tensor * op) {
    const ggml_tensor * input    = op->src[1];
    const int64_t       n_tokens = ggml_nrows(input);
    const int64_t       ith      = params.ith;
    const int64_t       nth      = params.nth;
    const size_t        row_size = input_size();
    float *             y        = static_cast<float *>(op->data);

    auto * work = static_cast<uint8_t *>(params.wdata);
    work += (64 - reinterpret_cast<uintptr_t>(work) % 64) % 64;
    GGML_ASSERT(ggml_is_contiguous(op));

    const auto give = [&](int64_t token) {
        if (is_float(m.type)) {
            std::memcpy(work + token * row_size, row_of(input, token), row_size);
        } else {
            auto * const q = reinterpret_cast<activations *>(work + token * row_size);
            best().products.quantize(row_of(input, token), m.n_cols, q);
        }
    };
    if (n_tokens <= OWN_TOKENS) {
        work += ith * n_tokens * row_size;
        for (int64_t token = 0; token < n_tokens; ++token) {
            give(token);
        }
    } else {
        for (int64_t token = ith; token < n_tokens; token += nth) {
            give(token);
        }
        ggml_barrier(params.threadpool);
    }

    if (ith == 0) {
        packed_tensor * before = owner.last.exchange(this, std::memory_order_relaxed);
        if (before && before->next.load(std::memory_order_relaxed) != this) {
            before->next.store(this, std::memory_order_relaxed);
        }
    }
    const packed_tensor * follower = next.load(std::memory_order_relaxed);
    const void *          follows  = nullptr;
    if (follower) {
        follows = follower->m.data + follower->first_group(ith, nth) * group_size(follower->m.type, follower->m.n_cols);
    }

    const int64_t g0 = first_group(ith, nth);
    const int64_t g1 = first_group(ith + 1, nth);
    if (n_tokens < 8 * nth || m.n_groups() >= 4 * nth) {
        multiply(m, g0, g1, work, n_tokens, y + g0 * GROUP, m.n_rows, follows);
    } else {  // few rows for so many threads: share the tokens instead
        const int64_t t0 = n_tokens * ith / nth;
        const int64_t t1 = n_tokens * (ith + 1) / nth;
        multiply(m, 0, m.n_groups(), work + t0 * row_size, t1 - t0, y + t0 * m.n_rows, m.n_rows, follows);
    }
}

void packed_tensor::get_rows(const ggml_compute_params & params, ggml_tensor * op) const {
    const ggml_tensor * rows = op->src[1];
    GGML_ASSERT(ggml_is_contiguous(op));

    for (int64_t i = params.ith; i < ggml_nelements(rows); i += params.nth) {
        const int64_t i0 = i % rows->ne[0];
        const int64_t i1 = i / rows->ne[0] % rows->ne[1];
        const int64_t i2 = i / rows->ne[0] / rows->ne[1];
        const char *  at =
            static_cast<const char *>(rows->data) + i0 * rows->nb[0] + i1 * rows->nb[1] + i2 * rows->nb[2];
        const int32_t row = *reinterpret_cast<const int32_t *>(at);
        GGML_ASSERT(row >= 0 && row < m.n_rows);
        unpack_row(m, row, static_cast<float *>(op->data) + i * m.n_cols);
    }
}

packed_tensor * extra_of(const ggml_tensor * tensor) {
    return static_cast<packed_tensor *>(tensor->extra);
}

packed_buffer & context_of(ggml_backend_buffer_t buffer) {
    return *static_cast<packed_buffer *>(buffer->context);
}

void free_buffer(ggml_backend_buffer_t buffer) {
    packed_buffer * context = &context_of(buffer);
    if (context->process != this_process()) {
        context->fillers.release();  // nobody is there to be joined
    }
    context->fillers.reset();
    ::operator delete[](context->memory, std::align_val_t(HUGE_PAGE));
    delete context;
}

void * get_base(ggml_backend_buffer_t buffer) {
    return context_of(buffer).memory;
}

ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    tensor->extra = nullptr;
    if (fits(tensor)) {
        const matrix    m{ tensor->type, tensor->ne[0], tensor->ne[1], static_cast<const uint8_t *>(tensor->data) };
        packed_buffer & context = context_of(buffer);
        context.tensors.push_back(std::make_unique<packed_tensor>(context, m));
        tensor->extra = context.tensors.back().get();
        ++context.n_unset;
    }
    return GGML_STATUS_SUCCESS;
}

void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    if (!extra_of(tensor)) {
        std::memcpy(static_cast<uint8_t *>(tensor->data) + offset, data, size);
        return;
    }
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));
    packed_buffer & context = context_of(buffer);
    const matrix    m       = extra_of(tensor)->m;
    auto *          out     = static_cast<uint8_t *>(tensor->data);

    const std::lock_guard<std::mutex> lock(context.filling);
    if (!context.fillers) {
        pack(m.type, m.n_cols, m.n_rows, data, 0, m.n_groups(), out);
        return;
    }
    const size_t  bytes = group_size(m.type, m.n_cols);
    const int64_t step  = std::max<int64_t>(BYTES_A_SHARE / bytes, 1);
    context.fillers->share((m.n_groups() + step - 1) / step, [&](int64_t i) {
        const int64_t g0 = i * step;
        const int64_t g1 = std::min(g0 + step, m.n_groups());
        context.fillers->prepare(out + g0 * bytes, (g1 - g0) * bytes);
        pack(m.type, m.n_cols, m.n_rows, data, g0, g1, out);
    });
    if (--context.n_unset <= 0) {
        context.fillers.reset();
        context.choose_streaming();
    }
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    if (!extra_of(tensor)) {
        std::memcpy(data, static_cast<const uint8_t *>(tensor->data) + offset, size);
        return;
    }
    const size_t         row_size = ggml_row_size(tensor->type, tensor->ne[0]);
    std::vector<uint8_t> row(row_size);
    for (size_t done = 0; done < size;) {
        const size_t from = (offset + done) % row_size;
        const size_t n    = std::min(row_size - from, size - done);
        unpack(extra_of(tensor)->m, (offset + done) / row_size, row.data());
        std::memcpy(static_cast<uint8_t *>(data) + done, row.data() + from, n);
        done += n;
    }
}

void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    std::memset(context_of(buffer).memory, value, context_of(buffer).size);
}

const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_MOBILELLM";
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    const size_t whole  = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    auto *       memory = static_cast<uint8_t *>(::operator new[](whole, std::align_val_t(HUGE_PAGE), std::nothrow));
    if (!memory) {
        return nullptr;
    }
#ifdef __linux__
    madvise(memory, whole, MADV_HUGEPAGE);  // decodes faster (docs/architecture.md); a wish, not a need
#endif
    ggml_backend_buffer_i functions = {};
    functions.free_buffer           = free_buffer;
    functions.get_base              = get_base;
    functions.init_tensor           = init_tensor;
    functions.set_tensor            = set_tensor;
    functions.get_tensor            = get_tensor;
    functions.clear                 = clear;

    auto * context   = new packed_buffer;
    context->memory  = memory;
    context->size    = size;
    context->fillers = std::make_unique<filling_threads>(memory, size);
    return ggml_backend_buffer_init(type, functions, context, size);
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    return fits(tensor) ? packed_size(tensor->type, tensor->ne[0], tensor->ne[1]) : ggml_nbytes(tensor);
}

bool ours(const ggml_tensor * tensor) {
    return tensor && tensor->buffer && tensor->buffer->buft == mobilellm_packed_buffer_type();
}

struct extra_buffer_type : ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * weight = op->src[0];
        const ggml_tensor * input  = op->src[1];
        if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_GET_ROWS) {
            return false;
        }
        if (!ours(weight) || !fits(weight) || (input->buffer && !ggml_backend_buft_is_host(input->buffer->buft))) {
            return false;
        }
        if (op->op == GGML_OP_MUL_MAT) {
            return input->type == GGML_TYPE_F32 && input->nb[0] == sizeof(float);
        }
        // other tables are looked at in other ways, too
        return input->type == GGML_TYPE_I32 && std::strcmp(weight->name, "token_embd.weight") == 0;
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        const bool known = op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_GET_ROWS;
        return known && packed(op->src[0]) ? extra_of(op->src[0]) : nullptr;
    }
};

}  // namespace

bool packed(const ggml_tensor * tensor) {
    return ours(tensor) && tensor->extra;
}

matrix as_matrix(const ggml_tensor * tensor) {
    return extra_of(tensor)->m;
}

}  // namespace mobilellm

ggml_backend_buffer_type_t mobilellm_packed_buffer_type() {
    using namespace mobilellm;

    static const bool wanted = mobilellm_kernels_wanted() != mobilellm_kernels::none && instruction_sets().size() > 1;
    static ggml_backend_buffer_type type = {
        { get_name, alloc_buffer, get_alignment, /*get_max_size*/ nullptr, get_alloc_size, /*is_host*/ nullptr },
        ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        new extra_buffer_type,
    };
    return wanted ? &type : nullptr;
}
