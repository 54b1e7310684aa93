#include "processor.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>

#ifdef __unix__
#include <unistd.h>
#endif

namespace mobilellm {

namespace {

const std::string CPU = "/sys/devices/system/cpu/cpu0/";

std::string line_of(const std::string & path) {
    std::ifstream file(path);
    std::string   line;
    std::getline(file, line);
    return line;
}

// How many numbers a list like 0-3,8 has; at least one.
int count(const std::string & list) {
    int n = 0;
    for (const char * at = list.c_str(); *at;) {
        char *     end;
        const long first = std::strtol(at, &end, 10);
        const long last  = *end == '-' ? std::strtol(end + 1, &end, 10) : first;
        if (end == at) {
            break;
        }
        n += int(last - first) + 1;
        at = *end ? end + 1 : end;
    }
    return std::max(n, 1);
}

// Where /sys is not to be read; most ARM systems answer 0.
int64_t size_by_sysconf([[maybe_unused]] int level) {
#ifdef _SC_LEVEL1_DCACHE_SIZE
    const int names[] = { _SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE };
    return std::max<int64_t>(sysconf(names[level - 1]), 0);
#else
    return 0;
#endif
}

}  // namespace

cache data_cache(int level) {
    const int siblings = count(line_of(CPU + "topology/thread_siblings_list"));
    for (int i = 0; i < 8; ++i) {
        const std::string index = CPU + "cache/index" + std::to_string(i) + "/";
        if (line_of(index + "level") == std::to_string(level) && line_of(index + "type") != "Instruction") {
            const std::string size = line_of(index + "size");  // 512K
            const int64_t     unit = size.find('M') != std::string::npos ? 1 << 20 : 1 << 10;
            return { std::atoll(size.c_str()) * unit,
                     std::max(count(line_of(index + "shared_cpu_list")) / siblings, 1) };
        }
    }
    return { size_by_sysconf(level), 1 };
}

int64_t first_level_cache() {
    static const int64_t size = data_cache(1).size;
    return size > 0 ? size : 32 * 1024;
}

int64_t second_level_share(int n_threads) {
    static const cache second = data_cache(2);
    return second.size / std::min(std::max(n_threads, 1), second.cores);
}

}  // namespace mobilellm
