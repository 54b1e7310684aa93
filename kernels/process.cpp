// What a process has once, for libllama and the CPU backend to look at. It lies in neither, because the backend may be
// one of several that are loaded at run time.

#include "packed_buffer.h"
#include "thread_pool.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

static thread_local int depth = 0;

int * mobilellm_guard_depth() {
    return &depth;
}

mobilellm_kernels mobilellm_kernels_wanted() {
    static const mobilellm_kernels wanted = [] {
        const char *      value   = std::getenv("MOBILELLM_KERNELS");
        const std::string setting = value ? value : "";
        if (setting == "" || setting == "1") {
            return mobilellm_kernels::all;
        }
        if (setting == "pack") {
            return mobilellm_kernels::pack;
        }
        if (setting != "0") {
            throw std::runtime_error("MOBILELLM_KERNELS is '" + setting + "', not 0, pack or 1");
        }
        return mobilellm_kernels::none;
    }();
    return wanted;
}
