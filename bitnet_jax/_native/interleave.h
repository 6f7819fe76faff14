// Four rows of stored int8 codes, 16 outputs of each, to a byte row of the layout. What it
// takes every x86-64 and AArch64 processor has.

#pragma once

#include "layout.h"
#include "target.h"

namespace bitnet {
namespace {

#if defined(BITNET_X86)

BITNET_INLINE void Interleave(const uint8_t* const (&rows)[4], int64_t at, uint8_t* to) {
  const __m128i bias = _mm_set1_epi8(-128);
  const auto* a = reinterpret_cast<const __m128i*>(rows[0] + at);
  const auto* b = reinterpret_cast<const __m128i*>(rows[1] + at);
  const auto* c = reinterpret_cast<const __m128i*>(rows[2] + at);
  const auto* d = reinterpret_cast<const __m128i*>(rows[3] + at);
  const __m128i first = _mm_xor_si128(_mm_loadu_si128(a), bias);
  const __m128i second = _mm_xor_si128(_mm_loadu_si128(b), bias);
  const __m128i third = _mm_xor_si128(_mm_loadu_si128(c), bias);
  const __m128i fourth = _mm_xor_si128(_mm_loadu_si128(d), bias);
  const __m128i low = _mm_unpacklo_epi8(first, second), high = _mm_unpackhi_epi8(first, second);
  const __m128i low_next = _mm_unpacklo_epi8(third, fourth);
  const __m128i high_next = _mm_unpackhi_epi8(third, fourth);
  auto* fours = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(fours, _mm_unpacklo_epi16(low, low_next));
  _mm_storeu_si128(fours + 1, _mm_unpackhi_epi16(low, low_next));
  _mm_storeu_si128(fours + 2, _mm_unpacklo_epi16(high, high_next));
  _mm_storeu_si128(fours + 3, _mm_unpackhi_epi16(high, high_next));
}

#elif defined(BITNET_ARM)

BITNET_INLINE void Interleave(const uint8_t* const (&rows)[4], int64_t at, uint8_t* to) {
  const uint8x16_t bias = vdupq_n_u8(128);
  uint8x16x4_t fours;  // which the store puts side by side, a byte of each
  fours.val[0] = veorq_u8(vld1q_u8(rows[0] + at), bias);
  fours.val[1] = veorq_u8(vld1q_u8(rows[1] + at), bias);
  fours.val[2] = veorq_u8(vld1q_u8(rows[2] + at), bias);
  fours.val[3] = veorq_u8(vld1q_u8(rows[3] + at), bias);
  vst4q_u8(to, fours);
}

#else

inline void Interleave(const uint8_t* const (&rows)[4], int64_t at, uint8_t* to) {
  for (int64_t l = 0; l < kOutputs; ++l) {
    for (int64_t i = 0; i < 4; ++i) to[4 * l + i] = rows[i][at + l] ^ 128;
  }
}

#endif

}  // namespace
}  // namespace bitnet
