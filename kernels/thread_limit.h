// How many threads a step gets while other programs want the cores, too.
//
// Threads that meet at barriers lose most of their time where one of them is not running. A step that took longer
// than its first thread's own work done twice would have been faster on half of the threads: after two such steps the
// next ones get half, and now and then one tries twice as many again. The results do not depend on it.

#pragma once

#include <algorithm>
#include <chrono>

#ifdef __unix__
#include <time.h>
#endif

namespace mobilellm {

// Seconds that the calling thread has run; where the system does not say, seconds.
inline double thread_seconds() {
#if defined(__unix__) && defined(CLOCK_THREAD_CPUTIME_ID)
    timespec now;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0) {
        return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
    }
#endif
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class thread_limit {
  public:
    // The most threads for the next step.
    int threads() {
        if (limit_ < unlimited && --rest_ < 0) {
            limit_ *= 2;
            late_ = 1;  // one late step is enough
        }
        return limit_;
    }

    // A step's first thread, around its work; `waiting` is what it ran at barriers.
    void begin() {
        wall_ = std::chrono::steady_clock::now();
        ran_  = thread_seconds();
    }

    void end(int n_threads, double waiting) {
        if (n_threads == 1) {
            return;
        }
        const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - wall_;
        if (wall.count() <= 2 * (thread_seconds() - ran_ - waiting)) {
            late_      = 0;
            rest_      = least_rest;
            next_rest_ = least_rest;
        } else if (++late_ == 2) {
            limit_     = n_threads / 2;
            rest_      = next_rest_;
            next_rest_ = std::min(2 * next_rest_, most_rest);
            late_      = 0;
        }
    }

  private:
    static constexpr int unlimited  = 1 << 16;
    static constexpr int least_rest = 4;  // steps until more threads are tried
    static constexpr int most_rest  = 64;

    int limit_     = unlimited;
    int rest_      = 0;
    int next_rest_ = least_rest;
    int late_      = 0;  // steps in a row

    std::chrono::steady_clock::time_point wall_;
    double                                ran_;
};

}  // namespace mobilellm
