#include "dispatch.h"

#ifdef MOBILELLM_AVX2
#include <cpuid.h>
#endif

namespace mobilellm {

extern const kernels   scalar_kernels;
extern const fused_ops scalar_fused_ops;

#ifdef MOBILELLM_AVX2
extern const kernels   avx2_kernels;
extern const fused_ops avx2_fused_ops;

static bool has_avx2() {
    unsigned a, b, c, d;
    // __builtin_cpu_supports does not know F16C in every compiler
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#ifdef MOBILELLM_AVX512VNNI
extern const kernels   avx512vnni_kernels;
extern const fused_ops avx512vnni_fused_ops;

static bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

const std::vector<instruction_set> & instruction_sets() {
    static const std::vector<instruction_set> sets = [] {
        std::vector<instruction_set> found;
#ifdef MOBILELLM_AVX512VNNI
        if (has_avx2() && has_avx512vnni()) {
            found.push_back({ "avx512vnni", avx512vnni_kernels, avx512vnni_fused_ops });
        }
#endif
#ifdef MOBILELLM_AVX2
        if (has_avx2()) {
            found.push_back({ "avx2", avx2_kernels, avx2_fused_ops });
        }
#endif
        found.push_back({ "scalar", scalar_kernels, scalar_fused_ops });
        return found;
    }();
    return sets;
}

}  // namespace mobilellm
