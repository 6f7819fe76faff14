// The parts that a compiler vectorises by itself. Every path includes this under its own
// instruction set, so all of it is in an anonymous namespace. Compiled with
// -ffp-contract=off: a fused multiply-add would round once where XLA rounds twice.

#pragma once

#include <cstring>

#include "path.h"

namespace bitnet {
namespace {

inline float AsFloat(float x) { return x; }

inline float AsFloat(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// gamma = max(max|x|, eps), codes round(x * (qmax / gamma)), half to even.
template <class Float>
float QuantizeRow(const Float* x, int64_t length, float qmax, float eps, int8_t* codes) {
  constexpr uint32_t kInfinity = 0x7F800000;
  // Magnitudes of floats are in the order of their bits, NaN last.
  uint32_t largest = 0;
  for (int64_t i = 0; i < length; ++i) {
    const uint32_t magnitude = Bits(AsFloat(x[i])) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest > kInfinity) largest = kInfinity;  // NaN, as _quantize/int8.py has it
  float gamma;
  std::memcpy(&gamma, &largest, sizeof(gamma));
  if (gamma < eps) gamma = eps;
  if (largest >= kInfinity) {
    std::memset(codes, 0, length);
    return gamma;
  }
  const float step = qmax / gamma;
  // Adding 1.5 * 2^23 leaves the rounded value in the low bits.
  constexpr float kRound = 12582912.0f;
  for (int64_t i = 0; i < length; ++i) {
    const float scaled = AsFloat(x[i]) * step;
    codes[i] = static_cast<int8_t>(Bits(scaled + kRound) - Bits(kRound));
  }
  return gamma;
}

inline int32_t TotalOf(const int8_t* codes, int64_t length) {
  int32_t total = 0;
  for (int64_t i = 0; i < length; ++i) total += codes[i];
  return total;
}

// ((sum * gamma) * (scale * R + z)) * (1 + z), z = gamma * 0 + scale * 0: the bits of
// epilogue in _ops/product.py; z is 0, or NaN where gamma or scale is not finite.
template <bool Add, int ScaleStep>
void FinishAs(const Epilogue& e) {
  for (int64_t m = 0; m < e.rows; ++m) {
    const int32_t* sums = e.sums + m * kWidth;
    float* y = e.y + m * e.y_stride;
    const float gamma = e.gamma[m * e.gamma_stride], zero = gamma * 0.0f;
    for (int64_t c = 0; c < e.columns; ++c) {
      const float scale = e.scale[c * ScaleStep];
      const float z = zero + scale * 0.0f;
      const float value =
          ((static_cast<float>(sums[c]) * gamma) * (scale * e.reciprocal + z)) * (1.0f + z);
      y[c] = Add ? y[c] + value : value;
    }
  }
}

void Finish(const Epilogue& e) {
  if (e.scale_step == 0) return e.add ? FinishAs<true, 0>(e) : FinishAs<false, 0>(e);
  return e.add ? FinishAs<true, 1>(e) : FinishAs<false, 1>(e);
}

}  // namespace
}  // namespace bitnet
