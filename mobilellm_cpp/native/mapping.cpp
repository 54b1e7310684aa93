#include "mapping.h"

#include <cstdint>

#ifdef __unix__
#include <sys/mman.h>
#include <unistd.h>
#endif

void mobilellm_release_mapped(const void * data, size_t size) {
#ifdef __unix__
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
