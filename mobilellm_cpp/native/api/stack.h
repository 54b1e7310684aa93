// Work on a stack of its own size: what upstream does by recursion can need more than a thread has.

#pragma once

#include "guard.h"

#include <stdexcept>

#ifndef _WIN32
#include <pthread.h>
#endif

// What work returns, on a thread with a stack of so many bytes. Throws what it throws, and where there is no memory for
// the stack.
template <typename Result, typename Work>
Result on_stack_of(size_t bytes, Work work) {
#ifndef _WIN32
    struct job {
        Work &      work;
        Result      result;
        std::string error;
        bool        failed;
    } job{ work, Result(), "", false };

    const auto run = [](void * data) -> void * {
        auto & job = *static_cast<struct job *>(data);
        mobilellm_guard_begin(true);
        try {
            job.result = job.work();
        } catch (const std::exception & error) {
            job.failed = true;
            job.error  = error.what();
        }
        if (job.error.empty()) {
            job.error = mobilellm_guard_reason();
        }
        mobilellm_guard_end();
        return nullptr;
    };
    pthread_attr_t settings;
    pthread_attr_init(&settings);
    pthread_attr_setstacksize(&settings, (1 << 20) + (bytes + 4095) / 4096 * 4096);
    pthread_t  thread;
    const bool started = pthread_create(&thread, &settings, run, &job) == 0;
    pthread_attr_destroy(&settings);
    if (!started) {
        throw std::runtime_error("there is no memory for a stack of " + std::to_string(bytes) + " bytes");
    }
    pthread_join(thread, nullptr);
    if (job.failed) {
        throw std::runtime_error(job.error);
    }
    if (!job.error.empty()) {
        mobilellm_set_reason(job.error);  // of this thread
    }
    return job.result;
#else
    (void) bytes;
    return work();
#endif
}
