// Which kernels this processor runs. Each instruction set brings two tables; a room for each kind of processor (x86/)
// holds its files, which are compiled with flags of their own and asked for nothing before the processor was.

#pragma once

#include "fused_ops.h"
#include "kernels.h"

#include <vector>

namespace mobilellm {

struct instruction_set {
    const char *      name;
    const kernels &   products;
    const fused_ops & ops;
};

// What this processor runs, the fastest first; the last is plain C++, the truth for the tests.
const std::vector<instruction_set> & instruction_sets();

inline const instruction_set & best() {
    return instruction_sets().front();
}

}  // namespace mobilellm
