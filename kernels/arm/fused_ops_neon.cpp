#include "arm/lanes.h"
#include "step/fused_ops_impl.h"

namespace mobilellm {

extern const fused_ops neon_fused_ops;
const fused_ops        neon_fused_ops = fused_ops_on<neon_lanes>::table;

}  // namespace mobilellm
