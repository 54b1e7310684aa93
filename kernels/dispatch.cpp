#include "dispatch.h"

#ifdef MOBILELLM_AVX2
#include <cpuid.h>
#endif
#if defined(MOBILELLM_NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(MOBILELLM_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
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

#ifdef MOBILELLM_NEON
extern const kernels   neon_kernels;
extern const kernels   dotprod_kernels;
extern const kernels   i8mm_kernels;
extern const fused_ops neon_fused_ops;

#if defined(__linux__)
static bool has_dotprod() {
    return getauxval(AT_HWCAP) >> 20 & 1;
}

static bool has_i8mm() {
    return has_dotprod() && getauxval(AT_HWCAP2) >> 13 & 1;
}
#elif defined(__APPLE__)
static bool has(const char * feature) {
    int    there = 0;
    size_t size  = sizeof(there);
    return sysctlbyname(feature, &there, &size, nullptr, 0) == 0 && there;
}

static bool has_dotprod() {
    return has("hw.optional.arm.FEAT_DotProd");
}

static bool has_i8mm() {
    return has_dotprod() && has("hw.optional.arm.FEAT_I8MM");
}
#else
static bool has_dotprod() {
    return false;
}

static bool has_i8mm() {
    return false;
}
#endif
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
#ifdef MOBILELLM_I8MM
        if (has_i8mm()) {
            found.push_back({ "i8mm", i8mm_kernels, neon_fused_ops });
        }
#endif
#ifdef MOBILELLM_DOTPROD
        if (has_dotprod()) {
            found.push_back({ "dotprod", dotprod_kernels, neon_fused_ops });
        }
#endif
#ifdef MOBILELLM_NEON
        found.push_back({ "neon", neon_kernels, neon_fused_ops });
#endif
        found.push_back({ "scalar", scalar_kernels, scalar_fused_ops });
        return found;
    }();
    return sets;
}

}  // namespace mobilellm
