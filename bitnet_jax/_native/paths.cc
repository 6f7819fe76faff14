#include "path.h"
#include "target.h"

namespace bitnet {

const Path* const kPaths[] = {
#ifdef BITNET_AMX
    &kAmxPath,
#endif
#ifdef BITNET_X86
    &kAvx512Path,
#endif
#ifdef BITNET_AVX_VNNI
    &kAvxVnniPath,
#endif
#ifdef BITNET_X86
    &kAvx2Path,
#endif
#ifdef BITNET_I8MM
    &kI8mmPath,
#endif
#ifdef BITNET_DOTPROD
    &kDotprodPath,
#endif
#ifdef BITNET_ARM
    &kNeonPath,
#endif
    &kPortablePath,
};
const int kPathCount = sizeof(kPaths) / sizeof(kPaths[0]);

}  // namespace bitnet
