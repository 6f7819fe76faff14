// What the paths with vectors of 32 bytes share: a byte row is two of them. Included by
// avx2.cc and avx_vnni.cc under their own targets.

#pragma once

#include "kernels.h"

namespace bitnet {
namespace {

struct Ymm {
  struct Row {
    __m256i low, high;
  };
  using Activations = __m256i;
  // 512 rows: slabs of 32 to 512 take 73 to 77 ms with AVX-VNNI and 67 to 73 with AVX2, within
  // noise.
  static constexpr int64_t kSlab = 128;
  static constexpr int kIndependent = 6;  // of two vectors each, as avx512.h

  static Row Load(const uint8_t* row) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(row);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  static void Write(uint8_t* row, Row v) {
    __m256i* halves = reinterpret_cast<__m256i*>(row);
    _mm256_storeu_si256(halves, v.low);
    _mm256_storeu_si256(halves + 1, v.high);
  }
  static Activations Every(const int8_t* x) { return _mm256_set1_epi32(Four(x)); }
  template <int j>
  static Row Field(Row bytes) {
    const __m256i mask = _mm256_set1_epi8(3);
    return {_mm256_and_si256(_mm256_srli_epi16(bytes.low, 2 * j), mask),
            _mm256_and_si256(_mm256_srli_epi16(bytes.high, 2 * j), mask)};
  }
  static void Prefetch(const uint8_t* row) {
    // One row, one thread, with AVX-VNNI: .24 ms; without .44, 2048 .26, 8192 .18. With AVX2 .16,
    // whatever it is.
    constexpr int64_t kAhead = 4096;
    _mm_prefetch(reinterpret_cast<const char*>(row + kAhead), _MM_HINT_T0);
  }
  // Compilers add products up among themselves first, and have no registers for them.
  template <class Lanes>
  static void InOrder(Lanes& low, Lanes& high) {
    asm("" : "+x"(low), "+x"(high));
  }
  static void Opaque(Activations& x) { asm volatile("" : "+v"(x)); }

  // Sums as what they are, and not as __m256i: see avx512.h.
  using Int16s = int16_t __attribute__((vector_size(32)));
  using Int32s = int32_t __attribute__((vector_size(32)));

  template <class Lanes>
  struct Sums {
    Lanes low, high;
    static Lanes Of(__m256i v) { return reinterpret_cast<Lanes>(v); }
    static __m256i Raw(Lanes v) { return reinterpret_cast<__m256i>(v); }
  };

  static void AddTo(int32_t* to, Row sums) {
    const Row there = Load(reinterpret_cast<const uint8_t*>(to));
    Write(reinterpret_cast<uint8_t*>(to),
          {_mm256_add_epi32(there.low, sums.low), _mm256_add_epi32(there.high, sums.high)});
  }
};

}  // namespace
}  // namespace bitnet
