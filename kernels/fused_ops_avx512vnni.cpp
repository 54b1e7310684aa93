#include "fused_ops_impl.h"
#include "kernels.h"

const mobilellm::fused_ops * mobilellm::avx512vnni_fused_ops() {
    return avx512vnni() ? &fused_ops_on<avx512_lanes>::table : nullptr;
}
