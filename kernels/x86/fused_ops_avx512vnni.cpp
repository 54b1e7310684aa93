#include "step/fused_ops_impl.h"
#include "x86/lanes.h"

namespace mobilellm {

extern const fused_ops avx512vnni_fused_ops;
const fused_ops        avx512vnni_fused_ops = fused_ops_on<avx512_lanes>::table;

}  // namespace mobilellm
