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
#endif

#define BITNET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BITNET_TARGET(set) \
  BITNET_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define BITNET_TARGET_END _Pragma("clang attribute pop")
#else
#define BITNET_TARGET(set) BITNET_PRAGMA(GCC push_options) BITNET_PRAGMA(GCC target(set))
#define BITNET_TARGET_END _Pragma("GCC pop_options")
#endif
