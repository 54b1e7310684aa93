// What `mobilellm bench` measures below Python: the bandwidth of memory, the output head's part of a step.

#include "api.h"
#include "dispatch.h"
#include "ggml-backend.h"
#include "guard.h"
#include "mobilellm.h"
#include "packed_buffer.h"
#include "streaming.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <future>
#include <memory>
#include <new>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using steady = std::chrono::steady_clock;

double seconds_since(steady::time_point start) {
    return std::chrono::duration<double>(steady::now() - start).count();
}

// Memory of size bytes in huge pages where the system has them.
struct pages {
    explicit pages(size_t size) : size(size) {
#ifdef __linux__
        void * mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped != MAP_FAILED) {
            madvise(mapped, size, MADV_HUGEPAGE);
            data = static_cast<char *>(mapped);
            return;
        }
        throw std::bad_alloc();
#else
        data = new char[size];
#endif
    }

    ~pages() {
#ifdef __linux__
        munmap(data, size);
#else
        delete[] data;
#endif
    }

    pages(const pages &)             = delete;
    pages & operator=(const pages &) = delete;

    char * data;
    size_t size;
};

constexpr size_t STEP        = 256;  // bytes of one turn of the loop: four cache lines
constexpr size_t MAX_STREAMS = 8;

#if defined(__GNUC__)
using words = uint64_t __attribute__((vector_size(64)));  // in registers, which an array is not always
#else
struct words {
    uint64_t word[8];

    void operator^=(const words & other) {
        for (int i = 0; i < 8; i++) {
            word[i] ^= other.word[i];
        }
    }

    uint64_t operator[](int i) const { return word[i]; }
};
#endif

// The exclusive or of size bytes, read as so many streams side by side, prefetching `ahead` bytes further on. LOCALITY
// is that of __builtin_prefetch; below 0: none.
template <int LOCALITY>
uint64_t read_all(const char * data, size_t size, size_t n_streams, size_t ahead) {
    words        even = {};
    words        odd  = {};
    const size_t part = size / n_streams;
    for (size_t at = 0; at < part; at += STEP) {
        for (const char * here = data + at; here < data + size; here += part) {
#if defined(__GNUC__)
            for (size_t line = 0; LOCALITY >= 0 && line < STEP; line += 64) {
                __builtin_prefetch(here + ahead + line, 0, LOCALITY < 0 ? 0 : LOCALITY);
            }
#endif
            for (size_t line = 0; line < STEP; line += 128) {
                even ^= *reinterpret_cast<const words *>(here + line);
                odd ^= *reinterpret_cast<const words *>(here + line + 64);
            }
        }
    }
    even ^= odd;
    uint64_t sum = 0;
    for (int i = 0; i < 8; i++) {
        sum ^= even[i];
    }
    return sum;
}

// What a processor's memory gives depends on how it is asked: by every prefetch instruction and none, near and far,
// in one stream and several.
struct way_to_read {
    uint64_t (*read)(const char * data, size_t size, size_t n_streams, size_t ahead);
    size_t n_streams;
    size_t ahead;
};

std::vector<way_to_read> ways_to_read() {
    std::vector<way_to_read> ways;
    for (size_t n_streams = 1; n_streams <= MAX_STREAMS; n_streams *= 2) {
        ways.push_back({ read_all<-1>, n_streams, 0 });
        for (const size_t ahead : { 1024, 4096 }) {
            for (const auto read : { read_all<0>, read_all<1>, read_all<2>, read_all<3> }) {
                ways.push_back({ read, n_streams, ahead });
            }
        }
    }
    return ways;
}

// Runs work(0) … work(n - 1) at once, each on a thread of its own; seconds from start to end.
template <typename Work>
double on_threads(int n, Work work) {
    const auto start = steady::now();
    {
        std::vector<std::future<void>> running;
        for (int i = 0; i < n; i++) {
            running.push_back(std::async(std::launch::async, work, i));
        }
    }  // a future waits for its thread
    return seconds_since(start);
}

struct head_clock {
    bool               seen = false;
    steady::time_point normed;
};

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

}  // namespace

bool mobilellm_at_final_norm(ggml_tensor * tensor, bool ask, void * data) {
    if (ask) {
        return std::strcmp(tensor->name, "result_norm") == 0;
    }
    auto & clock = *static_cast<head_clock *>(data);
    clock.seen   = true;
    clock.normed = steady::now();
    return true;
}

const char * mobilellm_kernels_text() {
    return under_guard<const char *>(
        nullptr, [] { return mobilellm_kernels_wanted() == mobilellm_kernels::none ? "" : mobilellm::best().name; });
}

bool mobilellm_packs_floats(const char * name) {
    return mobilellm::packs_floats(name);
}

const char * mobilellm_streaming_text() {
    static thread_local std::string text;
    text = mobilellm::streaming_text();
    return text.c_str();
}

void mobilellm_streaming_force(int32_t hint, int64_t ahead) {
    using mobilellm::streaming;
    if (hint < 0) {
        mobilellm::measure_streaming();
    } else {
        const auto cache = streaming::cache(std::min<int32_t>(hint, streaming::t0));
        mobilellm::force_streaming({ cache, std::max<int64_t>(ahead, 0) });
    }
}

double mobilellm_read_bandwidth(size_t size, int32_t n_threads) {
    try {
        constexpr size_t      whole = STEP * MAX_STREAMS;
        const size_t          share = size / n_threads / whole * whole;
        const pages           memory(share * n_threads);
        std::atomic<uint64_t> sum{ 0 };  // so that no read is dead
        on_threads(n_threads, [&](int i) { std::memset(memory.data + share * i, i + 1, share); });

        double best = 0;
        for (const way_to_read & way : ways_to_read()) {
            const double seconds = on_threads(
                n_threads, [&](int i) { sum ^= way.read(memory.data + share * i, share, way.n_streams, way.ahead); });
            best = std::max(best, double(memory.size) / seconds);
        }
        return best;
    } catch (const std::exception &) {
        return 0;
    }
}

double mobilellm_head_share(llama_model * model, llama_context_params params, llama_token token, int32_t n_steps) {
    head_clock clock;
    params.cb_eval           = mobilellm_at_final_norm;
    params.cb_eval_user_data = &clock;

    mobilellm_guard_begin(true);
    std::vector<double> shares;
    try {
        const std::unique_ptr<llama_context, decltype(&llama_free)> context(llama_init_from_model(model, params),
                                                                            llama_free);
        for (int32_t step = 0; context && step < n_steps; step++) {
            clock.seen       = false;
            const auto start = steady::now();
            if (llama_decode(context.get(), llama_batch_get_one(&token, 1)) != 0) {
                break;
            }
            llama_synchronize(context.get());
            const auto end = steady::now();
            if (clock.seen) {
                shares.push_back(double((end - clock.normed).count()) / double((end - start).count()));
            }
        }
    } catch (const std::exception &) {
        shares.clear();
    }
    mobilellm_guard_end();
    return shares.empty() ? 0 : median(shares);
}
