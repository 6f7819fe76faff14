// Puts all that follows it in a file under an instruction set:
//
//   #include "target.h"     // before any header whose code shall be compiled so
//   BITNET_TARGET("avx2")
//   #include "kernels.h"
//   BITNET_TARGET_END

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define BITNET_X86 1
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own headers
#endif
#include <immintrin.h>
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define BITNET_AVX_VNNI 1
#if defined(__linux__)
#define BITNET_AMX 1
#endif
#endif
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define BITNET_ARM 1
#include <arm_neon.h>
// The targets whose intrinsics <arm_neon.h> declares. GCC: always, for functions of the base that
// it has them for. Clang from 16 on and Apple's from 15 on; before, where all is built for them.
#if !defined(__clang__)
#define BITNET_DOTPROD "arch=armv8.2-a+dotprod"
#if __GNUC__ >= 10
#define BITNET_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif
#else
#if defined(__apple_build_version__) ? __clang_major__ >= 15 : __clang_major__ >= 16
#define BITNET_BY_TARGET 1
#endif
#if defined(BITNET_BY_TARGET) || defined(__ARM_FEATURE_DOTPROD)
#define BITNET_DOTPROD "dotprod"
#if defined(BITNET_BY_TARGET) || defined(__ARM_FEATURE_MATMUL_INT8)
#define BITNET_I8MM "dotprod,i8mm"
#endif
#endif
#endif
#endif

#define BITNET_INLINE inline __attribute__((always_inline))

#define BITNET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BITNET_TARGET(set) \
  BITNET_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define BITNET_TARGET_END _Pragma("clang attribute pop")
#else
#define BITNET_TARGET(set) BITNET_PRAGMA(GCC push_options) BITNET_PRAGMA(GCC target(set))
#define BITNET_TARGET_END _Pragma("GCC pop_options")
#endif
