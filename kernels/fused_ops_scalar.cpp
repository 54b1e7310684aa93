// The operations in plain C++: what every other file must equal. And the choice between them.

#include "fused_ops_impl.h"
#include "kernels.h"

namespace mobilellm {

const fused_ops & scalar_fused_ops() {
    return fused_ops_on<scalar_lanes>::table;
}

#ifndef MOBILELLM_AVX2
const fused_ops * avx2_fused_ops() {
    return nullptr;
}
#endif

#ifndef MOBILELLM_AVX512VNNI
const fused_ops * avx512vnni_fused_ops() {
    return nullptr;
}
#endif

// as kernels.h chooses, which looks at the processor
const fused_ops & best_fused_ops() {
    return &best() == avx512vnni() ? *avx512vnni_fused_ops()
           : &best() == avx2()     ? *avx2_fused_ops()
                                   : scalar_fused_ops();
}

}  // namespace mobilellm
