// Where the threads of a step meet: they spin, and after a while let others run.

#pragma once

#include <atomic>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace mobilellm {

class barrier {
  public:
    // Returns once all n threads are here. What any of them wrote before, all of them see after.
    void wait(int n) {
        if (n == 1) {
            return;
        }
        const unsigned phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; phase_.load(std::memory_order_acquire) == phase; ++i) {
            if (i < patience) {
                relax();
            } else {
                std::this_thread::yield();
            }
        }
    }

  private:
    // Pauses of 10 to 60 ns: about as long as threads that all run wait. Longer ones cost when others want the cores.
    static constexpr int patience = 100;

    static void relax() {
#if defined(__x86_64__) || defined(_M_X64)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    alignas(64) std::atomic<int> arrived_{ 0 };
    alignas(64) std::atomic<unsigned> phase_{ 0 };
};

}  // namespace mobilellm
