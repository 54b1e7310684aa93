// How many threads a step gets while other programs want the cores, too.
//
// Threads that meet at barriers lose most of their time where one of them is not running. A step that took longer
// than its first thread's own work done twice would have been faster on half of the threads, which the next ones then
// get. Now and then one tries twice as many again, rarely enough to lose 5 % by it. The results do not depend on it.

#pragma once

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
    using clock = std::chrono::steady_clock;

    // The most threads for the next step.
    int threads(clock::time_point now = clock::now()) {
        if (limit_ < unlimited && now >= again_) {
            limit_ *= 2;
            late_ = 1;  // one late step is enough
        }
        return limit_;
    }

    // A step's first thread, around its work; `waiting` is what it ran at barriers.
    void begin() {
        start_ = clock::now();
        ran_   = thread_seconds();
    }

    void end(int n_threads, double waiting) {
        if (n_threads > 1) {
            judge(n_threads, thread_seconds() - ran_ - waiting, clock::now() - start_, clock::now());
        }
    }

    // A step took `wall`, of which its first thread worked some seconds.
    void judge(int n_threads, double worked, clock::duration wall, clock::time_point now) {
        const double halved = std::chrono::duration<double>(wall).count() / (2 * worked);
        if (halved <= 1) {
            late_  = 0;
            again_ = now;
        } else if (++late_ == 2 || halved > 4) {
            limit_ = n_threads / 2;
            late_  = 0;
            again_ = now + 20 * wall;
        }
    }

  private:
    static constexpr int unlimited = 1 << 16;

    int               limit_ = unlimited;
    int               late_  = 0;  // steps in a row
    clock::time_point start_, again_;
    double            ran_ = 0.0;
};

}  // namespace mobilellm
