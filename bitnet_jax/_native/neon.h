// What the paths of Arm share: a byte row is four vectors of 16 bytes. Included by neon.cc,
// dotprod.h and i8mm.cc under their own targets.

#pragma once

#include "kernels.h"

namespace bitnet {
namespace {

struct Neon {
  struct Row {
    uint8x16_t a, b, c, d;
  };
  // As ymm.h: constants of Arm are counted from registers and instructions of what GCC makes, and
  // checked under emulation. No Arm processor has been there to time them.
  static constexpr int64_t kSlab = 128;
  static constexpr bool kInt8Alike = true;
  static constexpr int kIndependent = 6;
  // Codes as signed bytes: a ternary one is too large by 1, an int8 one is what it is.
  static constexpr uint32_t kBias[2] = {1, 0};

  static Row Load(const uint8_t* row) {
    return {vld1q_u8(row), vld1q_u8(row + 16), vld1q_u8(row + 32), vld1q_u8(row + 48)};
  }
  static void Write(uint8_t* row, Row v) {
    vst1q_u8(row, v.a);
    vst1q_u8(row + 16, v.b);
    vst1q_u8(row + 32, v.c);
    vst1q_u8(row + 48, v.d);
  }
  template <int j>
  static uint8x16_t FieldOf(uint8x16_t bytes) {
    if constexpr (j == 0)
      return vandq_u8(bytes, vdupq_n_u8(3));
    else if constexpr (j == 3)
      return vshrq_n_u8(bytes, 6);
    else
      return vandq_u8(vshrq_n_u8(bytes, 2 * j), vdupq_n_u8(3));
  }
  template <int j>
  static Row Field(Row bytes) {
    return {FieldOf<j>(bytes.a), FieldOf<j>(bytes.b), FieldOf<j>(bytes.c), FieldOf<j>(bytes.d)};
  }
  static void Prefetch(const uint8_t* row) {
    constexpr int64_t kAhead = 2048;  // half of x86's, for rows that are read more slowly
    __builtin_prefetch(row + kAhead);
  }
  template <class Vector>
  static void Opaque(Vector& x) {
    asm volatile("" : "+w"(x));
  }

  // Bytes of codes as numbers with the bias above.
  template <Kind kind>
  static int8x16_t Signed(uint8x16_t codes) {
    if constexpr (kind == Kind::kInt8) codes = veorq_u8(codes, vdupq_n_u8(128));
    return vreinterpretq_s8_u8(codes);
  }
  static void AddFour(int32_t* to, int32x4_t sums) {
    vst1q_s32(to, vaddq_s32(vld1q_s32(to), sums));
  }
};

}  // namespace
}  // namespace bitnet
