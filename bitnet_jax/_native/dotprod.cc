#include "target.h"

#ifdef BITNET_DOTPROD

#include "arm_has.h"

BITNET_TARGET(BITNET_DOTPROD)

#include "dotprod.h"

namespace bitnet {
namespace {

bool HasDotprod() { return ArmHas(Feature::kDotprod); }

}  // namespace

const Path kDotprodPath = PathOf<Dotprod>("dotprod", HasDotprod);

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_DOTPROD
