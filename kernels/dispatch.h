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

// The product by the best of them; x is activations, or where the matrix is of floats, floats.
inline void multiply(const matrix & m, int64_t g0, int64_t g1, const void * x, int64_t n_tokens, float * y,
                     int64_t stride, const void * next, const uint8_t * later = nullptr) {
    if (is_float(m.type)) {
        best().ops.matmul(m, g0, g1, static_cast<const float *>(x), n_tokens, y, stride, next);
    } else {
        best().products.matmul(m, g0, g1, static_cast<const activations *>(x), n_tokens, y, stride, next, later);
    }
}

}  // namespace mobilellm
