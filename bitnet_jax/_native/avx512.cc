#include "target.h"

#ifdef BITNET_X86

BITNET_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

#include "avx512.h"

namespace bitnet {
namespace {

bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Path kAvx512Path = PathOf<Avx512>("avx512_vnni", HasAvx512);

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_X86
