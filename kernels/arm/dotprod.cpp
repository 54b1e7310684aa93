// Processors with dot products, from Cortex-A55 and A76 on (Raspberry Pi 5).

#include "arm/dot_rows.h"

namespace mobilellm {

namespace {

struct dotprod_isa {
    static constexpr int TILE = 4;

    template <ggml_type TYPE, int T>
    static void tile(const part & p, const uint8_t * q, size_t q_size, float * y, int64_t stride, int64_t rows) {
        if constexpr (T == 1) {
            dot_one<TYPE>(p, q, y, rows);
        } else {
            float sums[T][GROUP];
            for (int r = 0; r < QUARTERS; ++r) {
                dot_rows<TYPE, T>(p, r, q, q_size, sums);
            }
            for (int t = 0; t < T; ++t) {
                store_rows(sums[t], y + t * stride, rows);
            }
        }
    }
};

}  // namespace

extern const kernels dotprod_kernels;
const kernels        dotprod_kernels = { quantize, matmul<dotprod_isa> };

}  // namespace mobilellm
