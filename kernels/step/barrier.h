// Where the threads of a step meet: they spin, and after a while let others run.

#pragma once

#include "thread_limit.h"

#include <atomic>
#include <thread>

namespace mobilellm {

// 10 to 60 ns for somebody else.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class barrier {
  public:
    // Returns once all n threads are here. What any of them wrote before, all of them see after. Where a thread has to
    // let others run, what it runs meanwhile is added to `waiting`.
    void wait(int n, double * waiting = nullptr) {
        if (n == 1) {
            return;
        }
        const unsigned phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; i < patience; ++i) {
            if (phase_.load(std::memory_order_acquire) != phase) {
                return;
            }
            relax();
        }
        const double start = waiting ? thread_seconds() : 0.0;
        while (phase_.load(std::memory_order_acquire) == phase) {
            std::this_thread::yield();
        }
        if (waiting) {
            *waiting += thread_seconds() - start;
        }
    }

  private:
    // Pauses: about as long as threads that all run wait. More of them cost when others want the cores.
    static constexpr int patience = 100;

    alignas(64) std::atomic<int> arrived_{ 0 };
    alignas(64) std::atomic<unsigned> phase_{ 0 };
};

}  // namespace mobilellm
