// The threads of a CPU backend (kernels/thread_pool.h): an assertion in any of them ends a graph and not the process,
// and a forked child computes. Prints what fails; exit status 1 then.

#include "api.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <atomic>
#include <csignal>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

// ThreadSanitizer lets no child of a process with several threads make any.
#if defined(__unix__) && !defined(__SANITIZE_THREAD__)
#define FORKS
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

constexpr int N_THREADS = 4;
constexpr int N         = 4096;

int n_failed = 0;

void check(bool good, const char * what) {
    if (!good) {
        std::printf("FAILED: %s\n", what);
        ++n_failed;
    }
}

// A graph of some nodes that all threads share; those of `failing` (a mask) assert in the middle one.
class graph {
  public:
    explicit graph(int n_threads) : backend_(ggml_backend_cpu_init()) {
        ggml_backend_cpu_set_n_threads(backend_, n_threads);
        ctx_               = ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
        input_             = ggml_new_tensor_1d(ctx_, GGML_TYPE_F32, N);
        ggml_tensor * rows = input_;
        for (int i = 0; i < 20; ++i) {
            rows = ggml_map_custom1(ctx_, rows, i == 10 ? assert_some : add_one, GGML_N_TASKS_MAX, this);
        }
        result_ = rows;
        cgraph_ = ggml_new_graph(ctx_);
        ggml_build_forward_expand(cgraph_, result_);
        buffer_ = ggml_backend_alloc_ctx_tensors(ctx_, backend_);
    }

    ~graph() {
        ggml_backend_buffer_free(buffer_);
        ggml_free(ctx_);
        ggml_backend_free(backend_);
    }

    ggml_status compute(unsigned failing) {
        failing_ = failing;
        const std::vector<float> zeros(N, 0.0f);
        ggml_backend_tensor_set(input_, zeros.data(), 0, N * sizeof(float));
        return ggml_backend_graph_compute(backend_, cgraph_);
    }

    bool right() const {
        std::vector<float> result(N);
        ggml_backend_tensor_get(result_, result.data(), 0, N * sizeof(float));
        for (const float value : result) {
            if (value != 20.0f) {
                return false;
            }
        }
        return true;
    }

  private:
    static void add_one(ggml_tensor * dst, const ggml_tensor * a, int ith, int nth, void *) {
        for (int i = N * ith / nth; i < N * (ith + 1) / nth; ++i) {
            static_cast<float *>(dst->data)[i] = static_cast<const float *>(a->data)[i] + 1.0f;
        }
    }

    static void assert_some(ggml_tensor * dst, const ggml_tensor * a, int ith, int nth, void * self) {
        const unsigned failing = static_cast<graph *>(self)->failing_;
        GGML_ASSERT(!(failing >> ith & 1) && "on purpose");
        add_one(dst, a, ith, nth, nullptr);
    }

    ggml_backend_t        backend_;
    ggml_context *        ctx_;
    ggml_tensor *         input_;
    ggml_tensor *         result_;
    ggml_cgraph *         cgraph_;
    ggml_backend_buffer_t buffer_;
    unsigned              failing_ = 0;
};

void assertions(int n_threads) {
    graph g(n_threads);
    for (int round = 0; round < 20; ++round) {
        for (unsigned failing = 0; failing < 1u << n_threads; ++failing) {
            mobilellm_guard_begin(true);
            const ggml_status status = g.compute(failing);
            const std::string reason = mobilellm_guard_reason();
            mobilellm_guard_end();
            if (failing) {
                check(status == GGML_STATUS_FAILED, "an assertion makes a graph fail");
                check(reason.find("on purpose") != std::string::npos, "the assertion is the reason");
            } else {
                check(status == GGML_STATUS_SUCCESS && g.right(), "the next graph is computed");
            }
        }
    }
}

#ifdef FORKS

// The exit status of what a forked child does; -signal where that ends it.
template <typename Work>
int in_child(Work work) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        alarm(30);
        _exit(work() ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

void forks() {
    graph g(N_THREADS);
    check(g.compute(0) == GGML_STATUS_SUCCESS, "a graph is computed");
    const auto again = [&] { return g.compute(0) == GGML_STATUS_SUCCESS && g.right(); };
    check(in_child(again) == 0, "a child computes what its parent did");
    check(in_child([&] { return again() && in_child(again) == 0; }) == 0, "and its child");
    check(in_child([] { return graph(N_THREADS).compute(0) == GGML_STATUS_SUCCESS; }) == 0, "a child has its own");
    check(in_child([] {
              auto * own = new graph(N_THREADS);
              own->compute(0);
              return in_child([own] {
                         delete own;
                         return true;
                     }) == 0;
          }) == 0,
          "a child frees what its parent computed with");
    check(again(), "the parent goes on");

    // while other threads are under guard, log and compute
    std::atomic<bool>        over{ false };
    std::vector<std::thread> busy;
    for (int i = 0; i < 3; ++i) {
        busy.emplace_back([&] {
            graph own(2);
            while (!over) {
                mobilellm_guard_begin(true);
                own.compute(0);
                mobilellm_guard_end();
            }
        });
    }
    for (int i = 0; i < 50; ++i) {
        const int status = in_child([&] {
            mobilellm_guard_begin(true);
            const bool good = again();
            mobilellm_guard_end();
            return good;
        });
        check(status == 0, "a child computes, whatever the threads of its parent did");
    }
    over = true;
    for (std::thread & thread : busy) {
        thread.join();
    }

    if (std::freopen("/dev/null", "w", stderr)) {
        check(in_child([&] { return g.compute(2) == GGML_STATUS_FAILED; }) == -SIGABRT,
              "without guard an assertion is ggml's abort");
    }
}

#endif

// Contexts on several threads at once.
void many() {
    std::vector<std::thread> callers;
    std::atomic<int>         n_right{ 0 };
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&, i] {
            graph own(1 + i % N_THREADS);
            for (int round = 0; round < 200; ++round) {
                n_right += own.compute(0) == GGML_STATUS_SUCCESS && own.right();
            }
        });
    }
    for (std::thread & caller : callers) {
        caller.join();
    }
    check(n_right == 4 * 200, "several contexts compute at once");
}

}  // namespace

int main() {
    for (int n = 1; n <= N_THREADS; ++n) {
        assertions(n);
    }
    many();
#ifdef FORKS
    forks();
#endif
    return n_failed ? 1 : 0;
}
