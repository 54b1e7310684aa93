#include "mapping.h"

#include <cstdint>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

void mobilellm_release_mapped(const void * data, size_t size) {
#if defined(__unix__) || defined(__APPLE__)
    const auto page  = uintptr_t(sysconf(_SC_PAGESIZE));
    const auto first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const auto end   = (reinterpret_cast<uintptr_t>(data) + size) / page * page;
    if (first < end) {
        madvise(reinterpret_cast<void *>(first), end - first, MADV_DONTNEED);  // locked pages stay
    }
#else
    (void) data;
    (void) size;
#endif
}
