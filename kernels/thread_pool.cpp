#include "thread_pool.h"

#include "barrier.h"
#include "ggml-impl.h"
#include "ggml-threading.h"
#include "this_process.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>

// no thread of the parent is inside when a child begins
static const int fork_safe =
    pthread_atfork(ggml_critical_section_start, ggml_critical_section_end, ggml_critical_section_end);
#endif

namespace mobilellm {

namespace {

constexpr int  PATIENCE = 1000;                            // pauses at a barrier before a thread sleeps
constexpr auto LINGER   = std::chrono::microseconds(200);  // after a graph before it sleeps

// Threads left a barrier to which one of them will not come.
struct given_up : std::exception {};

// How many threads the system gives, up to n, the caller among them: ggml's pool asserts that it gets all.
int available(int n) {
    std::mutex               start;
    std::vector<std::thread> probes;
    {
        const std::lock_guard<std::mutex> lock(start);
        try {
            while (int(probes.size()) + 1 < n) {
                probes.emplace_back([&] { const std::lock_guard<std::mutex> wait(start); });
            }
        } catch (const std::system_error &) {
        }
    }
    for (std::thread & probe : probes) {
        probe.join();
    }
    return int(probes.size()) + 1;
}

}  // namespace

class crew {
  public:
    explicit crew(int n) : n_threads_(available(n)) {
        ggml_threadpool_params params = ggml_threadpool_params_default(n_threads_);
        params.poll                   = 0;  // see linger
        pool_                         = ggml_threadpool_new(&params);
    }

    ~crew() { ggml_threadpool_free(pool_); }

    ggml_status compute(ggml_cgraph * graph, ggml_cplan plan) {
        caller_                  = std::this_thread::get_id();
        callback_                = plan.abort_callback;
        callback_data_           = plan.abort_callback_data;
        guard_depth_             = *mobilellm_guard_depth();
        plan.n_threads           = n_threads_;
        plan.threadpool          = pool_;
        plan.abort_callback      = abort_asked;
        plan.abort_callback_data = this;
        ++graph_;
        const ggml_status status = ggml_graph_compute(graph, &plan);
        return failed_ ? GGML_STATUS_FAILED : status;
    }

    // A thread's part of a graph.
    void work(mobilellm_task * task, void * state) {
        const unsigned graph  = graph_;
        const bool     worker = std::this_thread::get_id() != caller_;
        if (!worker) {
            begun_.store(graph, std::memory_order_relaxed);
        }
        const int depth          = *mobilellm_guard_depth();
        *mobilellm_guard_depth() = guard_depth_;
        at_hand                  = this;
        try {
            task(state);
        } catch (const given_up &) {
        } catch (const std::exception & error) {
            fail(error.what());
        }
        at_hand                  = nullptr;
        *mobilellm_guard_depth() = depth;
        if (worker) {
            linger(graph);
        }
    }

    // Returns once all n threads are here.
    void meet(int n) {
        const unsigned phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            // a fence, for qemu 7.2 lets a load pass a store on ARM where the language does not: who falls asleep
            // meanwhile would not be woken
            std::atomic_thread_fence(std::memory_order_seq_cst);
            if (n_asleep_.load() > 0) {
                {
                    const std::lock_guard<std::mutex> about_to_sleep(mutex_);
                }
                changed_.notify_all();
            }
            return;
        }
        for (int i = 0; i < PATIENCE; ++i) {
            if (phase_.load(std::memory_order_acquire) != phase) {
                return;
            }
            relax();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        ++n_asleep_;
        changed_.wait(lock, [&] { return phase_.load() != phase || failed_; });
        --n_asleep_;
        if (phase_.load() == phase) {
            throw given_up();
        }
    }

    // What the first thread threw; nullptr where none did.
    const char * failure() const { return failed_ ? reason_.c_str() : nullptr; }

    // Whose plan this is; nullptr for one of ggml's own.
    static crew * of(const ggml_cplan & plan) {
        return plan.abort_callback == abort_asked ? static_cast<crew *>(plan.abort_callback_data) : nullptr;
    }

    static thread_local crew * at_hand;  // whose graph the calling thread computes

  private:
    // Takes the place of the plan's, by which a worker knows its crew.
    static bool abort_asked(void * data) {
        const crew * c = static_cast<crew *>(data);
        return c->callback_ && c->callback_(c->callback_data_);
    }

    void fail(const char * reason) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failed_) {
            failed_ = true;
            reason_ = reason;
        }
        changed_.notify_all();
    }

    // Waits for the next graph, for which ggml would send the thread to sleep, or spin for milliseconds.
    void linger(unsigned graph) const {
        const auto end = std::chrono::steady_clock::now() + LINGER;
        while (begun_.load(std::memory_order_relaxed) != graph + 1 && std::chrono::steady_clock::now() < end) {
            relax();
        }
    }

    const int         n_threads_;
    ggml_threadpool_t pool_;

    // of the graph being computed, set before its threads begin
    std::thread::id     caller_;
    ggml_abort_callback callback_      = nullptr;
    void *              callback_data_ = nullptr;
    int                 guard_depth_   = 0;
    unsigned            graph_         = 0;

    alignas(64) std::atomic<unsigned> begun_{ 0 };  // the graph of which ggml has told the workers
    alignas(64) std::atomic<int> arrived_{ 0 };
    alignas(64) std::atomic<unsigned> phase_{ 0 };
    alignas(64) std::atomic<int> n_asleep_{ 0 };
    std::mutex              mutex_;
    std::condition_variable changed_;
    std::atomic<bool>       failed_{ false };
    std::string             reason_;
};

thread_local crew * crew::at_hand = nullptr;

threads::threads() : process_(this_process()) {}

threads::~threads() {
    abandon_if_forked();
}

// Threads of the parent cannot be joined here, and what they hold is in a state that nobody knows.
void threads::abandon_if_forked() {
    if (process_ != this_process()) {
        for (auto & [n, abandoned] : crews_) {
            abandoned.release();
        }
        crews_.clear();
        process_ = this_process();
    }
}

ggml_status threads::compute(ggml_cgraph * graph, const ggml_cplan & plan) {
    abandon_if_forked();
    std::unique_ptr<crew> & hands = crews_[plan.n_threads];
    if (!hands) {
        hands = std::make_unique<crew>(plan.n_threads);
    }
    const ggml_status status = hands->compute(graph, plan);
    if (const char * failure = hands->failure()) {
        const std::string reason = failure;
        hands.reset();  // when no thread looks at the graph any more
        GGML_LOG_ERROR("%s\n", reason.c_str());
    }
    return status;
}

}  // namespace mobilellm

bool mobilellm_work(const ggml_cplan * plan, mobilellm_task * task, void * state) {
    mobilellm::crew * crew = mobilellm::crew::of(*plan);
    if (!crew || crew == mobilellm::crew::at_hand) {
        return false;
    }
    crew->work(task, state);
    return true;
}

bool mobilellm_meet(int n_threads) {
    mobilellm::crew * crew = mobilellm::crew::at_hand;
    if (crew) {
        crew->meet(n_threads);
    }
    return crew != nullptr;
}
