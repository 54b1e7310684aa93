// What `mobilellm bench` measures below Python: the bandwidth of memory, the output head's part of a step.

#include "api.h"
#include "ggml-backend.h"
#include "mobilellm.h"
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

constexpr size_t STEP = 256;  // bytes of one turn of the loop: four cache lines

// The exclusive or of [begin, end), a multiple of STEP, prefetching `ahead` bytes further on.
uint64_t read_all(const char * begin, const char * end, size_t ahead) {
    uint64_t sums[8] = {};
    for (const char * at = begin; at < end; at += STEP) {
        for (size_t line = 0; line < STEP; line += 64) {
#if defined(__GNUC__)
            __builtin_prefetch(at + ahead + line);
#endif
        }
        uint64_t words[STEP / 8];
        std::memcpy(words, at, STEP);
        for (size_t i = 0; i < STEP / 8; i++) {
            sums[i % 8] ^= words[i];
        }
    }
    uint64_t sum = 0;
    for (uint64_t part : sums) {
        sum ^= part;
    }
    return sum;
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

double mobilellm_read_bandwidth(size_t size, int32_t n_threads, int32_t n_rounds) {
    try {
        const size_t          share = size / n_threads / STEP * STEP;
        const pages           memory(share * n_threads);
        std::atomic<uint64_t> sum{ 0 };  // so that no read is dead
        on_threads(n_threads, [&](int i) { std::memset(memory.data + share * i, i + 1, share); });

        double best = 0;
        for (int32_t round = 0; round < n_rounds; round++) {
            for (size_t ahead : { 0, 512, 1024, 2048, 4096 }) {
                const double seconds = on_threads(n_threads, [&](int i) {
                    const char * begin = memory.data + share * i;
                    sum ^= read_all(begin, begin + share, ahead);
                });
                best                 = std::max(best, double(memory.size) / seconds);
            }
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
