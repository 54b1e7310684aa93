// What the system tells about this processor's caches.

#pragma once

#include <cstdint>

namespace mobilellm {

struct cache {
    int64_t size;   // bytes, 0: nobody says
    int     cores;  // that share it
};

// The data cache of level 1, 2 or 3 of the first processor.
cache data_cache(int level);

// What a thread may take for its own of the first-level cache; 32 KB where nobody says.
int64_t first_level_cache();

// What each of n threads, on a core of its own, has of the second-level cache; 0 where nobody says.
int64_t second_level_share(int n_threads);

}  // namespace mobilellm
