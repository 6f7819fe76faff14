// The parts that a compiler vectorises by itself. Every path includes this under its own
// instruction set, so all of it is in an anonymous namespace. Compiled with
// -ffp-contract=off: a fused multiply-add would round once where XLA rounds twice.

#pragma once

#include <algorithm>
#include <cstring>

#include "interleave.h"
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

// Two stages of butterflies at once, over the halves `h` and `2 * h` of each run of 4 * h: what
// one stage after the other gives, to the bit.
inline void TwoStages(float* x, int64_t length, int64_t h) {
  for (int64_t i = 0; i < length; i += 4 * h) {
    float* a = x + i;
    for (int64_t j = 0; j < h; ++j) {
      const float x0 = a[j], x1 = a[j + h], x2 = a[j + 2 * h], x3 = a[j + 3 * h];
      const float low = x0 + x1, low_difference = x0 - x1;
      const float high = x2 + x3, high_difference = x2 - x3;
      a[j] = low + high;
      a[j + h] = low_difference + high_difference;
      a[j + 2 * h] = low - high;
      a[j + 3 * h] = low_difference - high_difference;
    }
  }
}

// The Walsh-Hadamard transform of each `block` of a row, a power of two of at least 4, times
// `factor`, as _quantize/rotation.py has it.
inline void RotateRow(float* x, int64_t length, int64_t block, float factor) {
  // A constant to the compiler where it is short: these stages are shuffles, and not loops.
  TwoStages(x, length, 1);
  if (block >= 16) TwoStages(x, length, 4);
  int64_t h = block >= 16 ? 16 : 4;
  for (; 4 * h <= block; h *= 4) TwoStages(x, length, h);
  if (h < block) {
    for (int64_t i = 0; i < length; i += 2 * h) {
      for (int64_t j = i; j < i + h; ++j) {
        const float low = x[j], high = x[j + h];
        x[j] = (low + high) * factor;
        x[j + h] = (low - high) * factor;
      }
    }
    return;
  }
  for (int64_t i = 0; i < length; ++i) x[i] *= factor;
}

// The panels of at most kWidth outputs, from four rows of codes at a time.
inline void LayOutRows(const uint8_t* stored, int64_t stride, int64_t outputs, int64_t depth,
                       const uint8_t* next, uint8_t* to) {
  static constexpr uint8_t kNone[kWidth] = {};
  uint8_t padded[4][kWidth] = {};
  const int64_t padded_outputs = Panels(outputs) * kOutputs;
  for (int64_t k = 0; k < depth; k += 4) {
    const uint8_t* rows[4];
    for (int64_t i = 0; i < 4; ++i) {
      rows[i] = k + i < depth ? stored + (k + i) * stride : kNone;
      if (next != nullptr) __builtin_prefetch(next + (k + i) * stride);
      if (outputs != padded_outputs) {
        std::memcpy(padded[i], rows[i], outputs);
        rows[i] = padded[i];
      }
    }
    for (int64_t n = 0; n < padded_outputs; n += kOutputs, to += kRowBytes) {
      Interleave(rows, n, to);
    }
  }
}

// The same from a table, where fours of an output lie together already.
inline void LayOutTable(const uint8_t* stored, int64_t stride, int64_t outputs, int64_t depth,
                        const uint8_t* next, uint8_t* to) {
  constexpr uint32_t kBias = 0x80808080u;
  constexpr int64_t kTogether = 4, kWeights = 16;  // of Transpose
  const int64_t row = Panels(outputs) * kRowBytes;
  for (int64_t n = 0; n < Panels(outputs) * kOutputs; n += kTogether, to += 4 * kTogether) {
    const uint8_t* codes = stored + n * stride;
    int64_t k = 0;
    if (n + kTogether <= outputs) {
      for (; k + kWeights <= depth; k += kWeights) {
        Transpose(codes + k, stride, to + k / 4 * row, row);
      }
    }
    for (; k < depth; k += 4) {
      for (int64_t i = 0; i < kTogether; ++i) {
        uint32_t four = 0;
        if (n + i < outputs) {
          std::memcpy(&four, codes + i * stride + k, depth - k < 4 ? depth - k : 4);
        }
        four ^= kBias;
        std::memcpy(to + k / 4 * row + 4 * i, &four, sizeof(four));
      }
    }
    if (next == nullptr) continue;
    for (int64_t i = 0; i < kTogether; ++i) {
      for (int64_t k = 0; k < depth; k += kRowBytes) {
        __builtin_prefetch(next + (n + i) * stride + k);
      }
    }
  }
}

void LayOutInt8(const int8_t* stored, Strides strides, int64_t outputs, int64_t depth,
                const int8_t* next, uint8_t* panels) {
  const auto* from = reinterpret_cast<const uint8_t*>(stored);
  const auto* then = reinterpret_cast<const uint8_t*>(next);
  if (strides.output == 1) return LayOutRows(from, strides.weight, outputs, depth, then, panels);
  LayOutTable(from, strides.output, outputs, depth, then, panels);
}

// Ternary panels of at most kWidth outputs side by side, from codes of eight bits `stride` apart.
void LayOutTernaryCodes(const int8_t* stored, int64_t stride, int64_t outputs, int64_t depth,
                        uint8_t* to) {
  const int64_t rows = ByteRows(Kind::kTernary, depth), count = Panels(outputs) * kOutputs;
  uint8_t none[kWidth], padded[4 * kFields][kWidth], bytes[4][kWidth];
  std::memset(none, -1, sizeof(none));  // a code that is stored as field 0, as padding is
  std::memset(padded, -1, sizeof(padded));
  const uint8_t* const made[4] = {bytes[0], bytes[1], bytes[2], bytes[3]};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = row / kBlockRows * kBlockRows;
    const int64_t field_depth = 4 * std::min(kBlockRows, rows - start);
    const int64_t k = kFields * 4 * start + 4 * (row - start);  // of field 0
    for (int64_t i = 0; i < 4; ++i) {
      const uint8_t* codes[kFields];
      for (int64_t j = 0; j < kFields; ++j) {
        const int64_t at = k + field_depth * j + i;
        codes[j] = at < depth ? reinterpret_cast<const uint8_t*>(stored) + at * stride : none;
        if (outputs == count || at >= depth) continue;
        std::memcpy(padded[4 * j + i], codes[j], outputs);
        codes[j] = padded[4 * j + i];
      }
      // Fields of code + 1, and what Interleave takes off again.
      constexpr uint8_t kOnes = 0x55 + 128;
      for (int64_t n = 0; n < count; ++n) {
        uint8_t sum = codes[3][n];
        for (int64_t j = kFields - 2; j >= 0; --j) {
          sum = static_cast<uint8_t>(sum + sum);
          sum = static_cast<uint8_t>(sum + sum + codes[j][n]);
        }
        bytes[i][n] = static_cast<uint8_t>(sum + kOnes);
      }
    }
    for (int64_t n = 0; n < count; n += kOutputs, to += kRowBytes) Interleave(made, n, to);
  }
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
