// What __builtin_cpu_supports does not know in every compiler.

#pragma once

#include <cpuid.h>

namespace bitnet {
namespace {

constexpr int kEax = 0, kEbx = 1, kEdx = 3;

inline bool CpuHas(unsigned leaf, unsigned sub, int reg, int bit) {
  unsigned regs[4];
  return __get_cpuid_max(0, nullptr) >= leaf &&
         __get_cpuid_count(leaf, sub, &regs[0], &regs[1], &regs[2], &regs[3]) != 0 &&
         ((regs[reg] >> bit) & 1) != 0;
}

}  // namespace
}  // namespace bitnet
