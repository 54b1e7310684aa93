#include "fused_ops_impl.h"
#include "kernels.h"

const mobilellm::fused_ops * mobilellm::avx2_fused_ops() {
    return avx2() ? &fused_ops_on<avx2_lanes>::table : nullptr;
}
