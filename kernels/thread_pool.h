/* The threads that compute a context's graphs: made at the first one, kept from graph to graph, freed with the
 * context. ggml's thread pool runs them; here is what it leaves to be wished for. Threads that wait for each other
 * sleep after a while, an assertion under guard ends the graph and not the process, and a process that was forked makes
 * threads of its own. */

#pragma once

#include "ggml-cpu.h"

#ifdef __cplusplus

#include <map>
#include <memory>

namespace mobilellm {

class crew;

// Of one CPU backend, which llama.cpp makes for each context.
class threads {
  public:
    threads();
    ~threads();

    // ggml_graph_compute on these threads. What one of them throws is logged as an error, and the graph has failed.
    ggml_status compute(ggml_cgraph * graph, const ggml_cplan & plan);

  private:
    void abandon_if_forked();

    std::map<int, std::unique_ptr<crew>> crews_;  // by their number of threads
    long                                 process_;
};

}  // namespace mobilellm

extern "C" {
#endif

/* How deep the calling thread is under guard (native/api/guard.h); threads that compute for it are as deep. */
GGML_API int * mobilellm_guard_depth(void);

/* What ggml-cpu.c calls in every thread: for its part of a graph, and at a barrier. False where the graph is not one of
 * threads of ours, or this is a part of it already: then ggml goes on by itself. */
#ifdef _WIN32
typedef unsigned long mobilellm_task(void * state);
#else
typedef void * mobilellm_task(void * state);
#endif
bool mobilellm_work(const struct ggml_cplan * plan, mobilellm_task * task, void * state);
bool mobilellm_meet(int n_threads);

#ifdef __cplusplus
}
#endif
