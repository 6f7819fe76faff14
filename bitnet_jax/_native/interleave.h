// Stored int8 codes to byte rows of the layout: 16 outputs of four rows of a kernel to one, or
// 16 weights of four outputs of a table to a quarter of each of four. What it takes every x86-64
// and AArch64 processor has.

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

BITNET_INLINE void Transpose(const uint8_t* codes, int64_t stride, uint8_t* to, int64_t row) {
  const __m128i bias = _mm_set1_epi8(-128);
  const auto load = [&](int64_t output) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + output * stride));
  };
  const auto store = [&](int64_t four, __m128i v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + four * row), _mm_xor_si128(v, bias));
  };
  const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
  const __m128i low = _mm_unpacklo_epi32(a, b), low_next = _mm_unpacklo_epi32(c, d);
  const __m128i high = _mm_unpackhi_epi32(a, b), high_next = _mm_unpackhi_epi32(c, d);
  store(0, _mm_unpacklo_epi64(low, low_next));
  store(1, _mm_unpackhi_epi64(low, low_next));
  store(2, _mm_unpacklo_epi64(high, high_next));
  store(3, _mm_unpackhi_epi64(high, high_next));
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

inline void Transpose(const uint8_t* codes, int64_t stride, uint8_t* to, int64_t row) {
  const auto load = [&](int64_t output) {
    return vreinterpretq_u32_u8(veorq_u8(vld1q_u8(codes + output * stride), vdupq_n_u8(128)));
  };
  uint32x4x4_t fours = {{load(0), load(1), load(2), load(3)}};
  uint8_t words[kRowBytes];
  vst4q_u32(reinterpret_cast<uint32_t*>(words), fours);
  for (int64_t i = 0; i < 4; ++i) vst1q_u8(to + i * row, vld1q_u8(words + 16 * i));
}

#else

inline void Interleave(const uint8_t* const (&rows)[4], int64_t at, uint8_t* to) {
  for (int64_t l = 0; l < kOutputs; ++l) {
    for (int64_t i = 0; i < 4; ++i) to[4 * l + i] = rows[i][at + l] ^ 128;
  }
}

inline void Transpose(const uint8_t* codes, int64_t stride, uint8_t* to, int64_t row) {
  for (int64_t l = 0; l < 4; ++l) {
    for (int64_t k = 0; k < 16; ++k) to[k / 4 * row + 4 * l + k % 4] = codes[l * stride + k] ^ 128;
  }
}

#endif

}  // namespace
}  // namespace bitnet
