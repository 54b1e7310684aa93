// Which process this is. After a fork the child has the memory of its parent's threads, and not the threads.

#pragma once

#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

namespace mobilellm {

inline long this_process() {
#ifdef _WIN32
    return _getpid();
#else
    return getpid();
#endif
}

}  // namespace mobilellm
