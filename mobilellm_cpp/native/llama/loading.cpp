#include "loading.h"

#include "ggml-alloc.h"
#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

// The buffer type of packed_buffer.h, nullptr where it is not in use.
ggml_backend_buffer_type_t packed_type(ggml_backend_dev_t cpu) {
    const auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
    for (ggml_backend_buffer_type_t * type = get ? get(cpu) : nullptr; type && *type; ++type) {
        if (std::strcmp(ggml_backend_buft_name(*type), "CPU_MOBILELLM") == 0) {
            return *type;
        }
    }
    return nullptr;
}

// What the tensors of ctx need in a buffer of their own, 0 where not all are to be allocated.
size_t size_of(ggml_context * ctx, ggml_backend_buffer_type_t type) {
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->data || t->view_src) {
            return 0;
        }
    }
    return ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, type);
}

#if defined(__unix__) || defined(__APPLE__)
uintptr_t page_size() {
    return uintptr_t(sysconf(_SC_PAGESIZE));
}
#endif

// Keeps the pages of a buffer in memory from when they are first used; throws where the system does not let us.
void lock(ggml_backend_buffer_t buffer) {
    void * const base   = buffer ? ggml_backend_buffer_get_base(buffer) : nullptr;
    const size_t size   = buffer ? ggml_backend_buffer_get_size(buffer) : 0;
    bool         locked = size == 0;
#ifdef MLOCK_ONFAULT
    locked = locked || mlock2(base, size, MLOCK_ONFAULT) == 0;
#elif defined(__unix__) || defined(__APPLE__)
    locked = locked || mlock(base, size) == 0;
#endif
    if (!locked) {
        throw std::runtime_error("the system does not let this process lock " + std::to_string(size >> 20) +
                                 " MB of memory: raise the limit (ulimit -l), or do without mlock");
    }
}

}  // namespace

std::string mobilellm_kv_text(const gguf_context * file, int i) {
    constexpr size_t SHOWN = 40;
    if (gguf_get_kv_type(file, i) != GGUF_TYPE_ARRAY || gguf_get_arr_n(file, i) <= SHOWN) {
        return gguf_kv_to_str(file, i);
    }
    const gguf_context_ptr first(gguf_init_empty());
    const gguf_type        type = gguf_get_arr_type(file, i);
    if (type == GGUF_TYPE_STRING) {
        std::vector<const char *> strings;
        for (size_t j = 0; j < SHOWN; ++j) {
            strings.push_back(gguf_get_arr_str(file, i, j));
        }
        gguf_set_arr_str(first.get(), "first", strings.data(), SHOWN);
    } else {
        gguf_set_arr_data(first.get(), "first", type, gguf_get_arr_data(file, i), SHOWN);
    }
    return gguf_kv_to_str(first.get(), 0);
}

void mobilellm_reserve_weights(llama_model_loader & loader, llama_model_params & params) {
    ggml_backend_dev_t         cpu  = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_buffer_type_t type = cpu ? packed_type(cpu) : nullptr;
    if (!type || loader.files.empty() || params.vocab_only || params.no_alloc || !params.use_extra_bufts) {
        return;
    }
    const ggml_backend_buffer_ptr nowhere(ggml_backend_buft_alloc_buffer(type, 0));

    size_t size = 0, packed = 0, all = 0;
    for (const auto & [name, stored] : loader.weights_map) {
        ggml_tensor weight = *stored.tensor;
        ggml_tensor input = {}, product = {};
        weight.buffer  = nowhere.get();
        input.type     = GGML_TYPE_F32;
        input.nb[0]    = sizeof(float);
        product.op     = GGML_OP_MUL_MAT;
        product.src[0] = &weight;
        product.src[1] = &input;
        all += ggml_nbytes(&weight);
        if (ggml_backend_dev_supports_op(cpu, &product)) {
            size += GGML_PAD(ggml_backend_buft_get_alloc_size(type, &weight), ggml_backend_buft_get_alignment(type));
            packed += ggml_nbytes(&weight);
        }
    }
    if (packed <= all / 2) {
        return;
    }
    loader.ours.reserved.reset(ggml_backend_buft_alloc_buffer(type, size));
    loader.ours.on_demand = loader.use_mmap;
    if (params.load_mode == LLAMA_LOAD_MODE_MLOCK || params.load_mode == LLAMA_LOAD_MODE_MMAP_MLOCK) {
        lock(loader.ours.reserved.get());
        params.load_mode = loader.use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    }
#ifdef POSIX_FADV_WILLNEED
    for (const auto & file : loader.files) {
        if (loader.use_mmap) {
            posix_fadvise(file->file_id(), 0, 0, POSIX_FADV_WILLNEED);
        }
    }
#endif
}

bool mobilellm_clear_later(ggml_backend_buffer_t cache) {
#ifdef __linux__
    if (ggml_backend_buffer_get_type(cache) != ggml_backend_cpu_buffer_type()) {
        return false;
    }
    auto * const    first = static_cast<uint8_t *>(ggml_backend_buffer_get_base(cache));
    auto * const    end   = first + ggml_backend_buffer_get_size(cache);
    const uintptr_t from  = (reinterpret_cast<uintptr_t>(first) + page_size() - 1) / page_size() * page_size();
    const uintptr_t to    = reinterpret_cast<uintptr_t>(end) / page_size() * page_size();
    // pages given back are zeros when they are next used
    if (from >= to || madvise(reinterpret_cast<void *>(from), to - from, MADV_DONTNEED) != 0) {
        return false;
    }
    std::memset(first, 0, from - reinterpret_cast<uintptr_t>(first));
    std::memset(reinterpret_cast<void *>(to), 0, reinterpret_cast<uintptr_t>(end) - to);
    return true;
#else
    return false;
#endif
}

ggml_backend_buffer_t mobilellm_alloc_weights(llama_model_loader & loader, ggml_context * ctx,
                                              ggml_backend_buffer_type_t type) {
    ggml_backend_buffer_t buffer = loader.ours.reserved.get();
    if (buffer && ggml_backend_buffer_get_type(buffer) == type) {
        if (size_of(ctx, type) == ggml_backend_buffer_get_size(buffer)) {
            ggml_tallocr allocator = ggml_tallocr_new(buffer);
            for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
                ggml_tallocr_alloc(&allocator, t);
            }
            return loader.ours.reserved.release();
        }
        loader.ours.reserved.reset();
    }
    return ggml_backend_alloc_ctx_tensors_from_buft(ctx, type);
}

void mobilellm_loading::map(const llama_mmap & mapping, const void * data, size_t size) {
    constexpr ptrdiff_t AT_ONCE = 2 << 20;

    const auto * from = static_cast<const uint8_t *>(data);
    if (from >= first && from + size <= end) {
        return;
    }
    release();
    const auto * whole = static_cast<const uint8_t *>(mapping.addr());
    first              = from;
    end                = std::max(from + size, std::min(from + AT_ONCE, whole + mapping.size()));
#ifdef MADV_POPULATE_READ
    if (on_demand) {
        const auto begin = uintptr_t(first) / page_size() * page_size();
        madvise(reinterpret_cast<void *>(begin), uintptr_t(end) - begin, MADV_POPULATE_READ);
    }
#endif
}

void mobilellm_loading::release() {
#if defined(__unix__) || defined(__APPLE__)
    const auto page  = page_size();
    const auto begin = (uintptr_t(first) + page - 1) / page * page;
    const auto last  = uintptr_t(end) / page * page;
    if (begin < last) {
        madvise(reinterpret_cast<void *>(begin), last - begin, MADV_DONTNEED);  // locked pages stay
    }
#endif
    first = end = nullptr;
}
