// The threads that fill a buffer of packed weights, the caller's among them. They live from its allocation until its
// last matrix is packed, and have its memory ready before it is needed: a fresh huge page is cleared by the system
// when it is first written to (0.25 ms and more), which so happens while the loader reads the vocabulary, and not twice
// because two threads meet it at once. The last quarter is left for later: a matrix that is being packed is in memory
// twice, and the largest, the embedding of a small model, is as much as that.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace mobilellm {

constexpr size_t HUGE_PAGE = 2 << 20;

class filling_threads {
  public:
    filling_threads(uint8_t * memory, size_t size) : memory(memory), ready((size + HUGE_PAGE - 1) / HUGE_PAGE) {
        const size_t limit = std::min<size_t>(size / BYTES_A_THREAD, std::thread::hardware_concurrency());
        try {
            while (threads.size() + 1 < limit) {
                threads.emplace_back([this] { help(); });
            }
        } catch (const std::exception &) {
            // as many as the system gives; all shares are taken all the same
        }
    }

    ~filling_threads() {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            over      = true;
            next_page = ready.size();
        }
        changed.notify_all();
        for (std::thread & thread : threads) {
            thread.join();
        }
    }

    // Calls work(i) for each i in [0, n), on all threads. One call at a time.
    void share(int64_t n, const std::function<void(int64_t)> & work) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            job        = &work;
            n_shares   = n;
            next_share = 0;
            ++n_jobs;
        }
        changed.notify_all();
        take_shares(n, work);
        for (int i = 0; i < PATIENCE && n_busy > 0; ++i) {
            std::this_thread::yield();
        }
        std::unique_lock<std::mutex> lock(mutex);
        job = nullptr;
        changed.wait(lock, [this] { return n_busy == 0; });
    }

    // Returns when the pages of [data, data + size) are ready.
    void prepare(const uint8_t * data, size_t size) {
        const size_t first = data - memory;
        for (size_t page = first / HUGE_PAGE; page * HUGE_PAGE < first + size; ++page) {
            while (!ready[page]) {
                if (!prepare_next()) {
                    std::this_thread::yield();
                }
            }
        }
    }

  private:
    static constexpr size_t BYTES_A_THREAD = 4 << 20;  // of a buffer; below, a thread costs more than it does
    static constexpr int    PATIENCE       = 200;      // looks whether there is work, before a thread sleeps

    void help() {
        for (int64_t seen = 0;;) {
            while (n_jobs == seen && next_page < ready.size() * 3 / 4 && prepare_next()) {
            }
            for (int i = 0; i < PATIENCE && n_jobs == seen; ++i) {
                std::this_thread::yield();
            }
            std::unique_lock<std::mutex> lock(mutex);
            changed.wait(lock, [&] { return over || n_jobs != seen; });
            if (over) {
                return;
            }
            seen = n_jobs;
            if (job) {
                const auto    work = job;
                const int64_t n    = n_shares;
                ++n_busy;
                lock.unlock();
                take_shares(n, *work);
                lock.lock();
                if (--n_busy == 0) {
                    changed.notify_all();
                }
            }
        }
    }

    void take_shares(int64_t n, const std::function<void(int64_t)> & work) {
        for (int64_t i; (i = next_share++) < n;) {
            work(i);
        }
    }

    // Makes one page ready; false when all are, or will be.
    bool prepare_next() {
        const size_t page = next_page < ready.size() ? next_page++ : ready.size();
        if (page >= ready.size()) {
            return false;
        }
        // A write that changes nothing. MADV_POPULATE_WRITE would keep other threads from allocating meanwhile.
        auto *  byte = reinterpret_cast<std::atomic<uint8_t> *>(memory + page * HUGE_PAGE);
        uint8_t zero = 0;
        byte->compare_exchange_strong(zero, 0);
        ready[page] = true;
        return true;
    }

    uint8_t * const                memory;
    std::vector<std::atomic<bool>> ready;  // each page
    std::atomic<size_t>            next_page{ 0 };

    std::mutex                           mutex;
    std::condition_variable              changed;
    const std::function<void(int64_t)> * job      = nullptr;
    int64_t                              n_shares = 0;
    std::atomic<int64_t>                 next_share{ 0 };
    std::atomic<int64_t>                 n_jobs{ 0 };  // so far
    std::atomic<int>                     n_busy{ 0 };  // of the threads
    bool                                 over = false;
    std::vector<std::thread>             threads;
};

}  // namespace mobilellm
