// The operations in plain C++: what every other file must equal.

#include "step/fused_ops_impl.h"

namespace mobilellm {

extern const fused_ops scalar_fused_ops;
const fused_ops        scalar_fused_ops = fused_ops_on<scalar_lanes>::table;

}  // namespace mobilellm
