// Whether an Arm processor has an instruction set: what the operating system says.

#pragma once

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <cstddef>

namespace bitnet {
namespace {

enum class Feature { kDotprod, kI8mm };

inline bool ArmHas(Feature feature) {
  const bool dotprod = feature == Feature::kDotprod;
#if defined(__linux__)
  // The bits of HWCAP_ASIMDDP and HWCAP2_I8MM, which older headers do not name.
  return dotprod ? (getauxval(AT_HWCAP) >> 20) & 1 : (getauxval(AT_HWCAP2) >> 13) & 1;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  const char* name = dotprod ? "hw.optional.arm.FEAT_DotProd" : "hw.optional.arm.FEAT_I8MM";
  return sysctlbyname(name, &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return dotprod && false;
#endif
}

}  // namespace
}  // namespace bitnet
