// What an instruction set has to offer: one `Path` each, compiled from the same
// templates (kernels.h) or by hand (portable.cc, amx.cc).

#pragma once

#include <atomic>

#include "layout.h"

namespace bitnet {

// Outputs of a call, and so the row stride of its sums.
constexpr int64_t kWidth = kPanels * kOutputs;

// Int8 codes of activations. Each row is readable up to a multiple of kPadding, and zero
// beyond the contraction of an int8 kernel. -128 is no code.
struct Rows {
  const int8_t* codes;
  int64_t stride;
  int64_t count;
  // The sum of each row over the contraction. Null: sums go on from what is there, int8 alone.
  const int32_t* totals;
};

// Up to kPanels panels that lie side by side, from their first byte row, and the run of their
// fours that x meets.
struct Beside {
  const uint8_t* panels;
  int64_t byte_rows, count;
  Fours fours;
};

// Stored int8 codes, (depth, outputs), to the panels of at most kWidth outputs side by side, from
// their first byte row. `next` is where what will be laid out after them lies, or null.
using LayOutCodes = void (*)(const int8_t* stored, Strides strides, int64_t outputs, int64_t depth,
                             const int8_t* next, uint8_t* panels);

// Exact sums of activations times codes: (x.count, kWidth) int32, of which 16 outputs a
// panel are written.
using Sums = void (*)(const Rows& x, const Beside& codes, int32_t* sums);

// One token: codes, and its gamma, infinite where x has NaN or Inf.
template <class Float>
using Quantize = float (*)(const Float* x, int64_t length, float qmax, float eps, int8_t* codes);

// The epilogue of (rows, columns) of `sums`: it sets y, or adds to it where `add`.
// Gammas of rows are `gamma_stride` apart; `scale_step` is 0 where all outputs share a scale.
struct Epilogue {
  const int32_t* sums;
  int64_t rows, columns;
  const float* gamma;
  int64_t gamma_stride;
  const float* scale;
  int64_t scale_step;
  float reciprocal;  // float32(1 / qmax)
  bool add;
  float* y;
  int64_t y_stride;
};

struct BFloat16 {
  uint16_t bits;
};

// Columns of a kernel of floats that are summed together, and a power of two that keeps a sum
// of weights near the largest float finite.
constexpr int64_t kColumns = 128;
constexpr float kShift = 0x1p-32f;

// Sums of |w| * kShift down at most kColumns columns, `stride` apart from row to row, of all
// weights or, where there are `codes`, of those that are not 0 in it.
template <class Float>
using SumColumns = void (*)(const Float* w, const int8_t* codes, int64_t rows, int64_t columns,
                            int64_t stride, float* sums);

// Ternary codes of whole rows, from the statistic of each column or, at `step` 0, of all.
template <class Float>
using TernaryCodes = void (*)(const Float* w, const float* statistic, int64_t step, int64_t rows,
                              int64_t columns, float threshold, int8_t* codes);

template <class Float>
struct KernelQuantizer {
  SumColumns<Float> sum;
  TernaryCodes<Float> codes;
};

// What may be changed while the library runs: no result depends on it. 0 is what a path has no
// use for.
struct Tuning {
  std::atomic<int64_t> direct_rows;  // up to so many rows, ternary fields unpack in registers
  std::atomic<int64_t> slab;         // rows that share one unpacking of a panel
  std::atomic<int64_t> step_rows;    // ternary byte rows that are unpacked at a time
};

struct Path {
  const char* name;
  bool (*supported)();
  Tuning* tuning;
  int64_t most_step_rows;
  Sums ternary;
  Sums int8;
  Quantize<float> quantize;
  Quantize<BFloat16> quantize_bfloat16;
  // Rotates a row in its place, see RotateRow.
  void (*rotate)(float* x, int64_t length, int64_t block, float factor);
  KernelQuantizer<float> kernel;
  KernelQuantizer<BFloat16> kernel_bfloat16;
  LayOutCodes lay_out;
  void (*lay_out_ternary)(const int8_t* stored, int64_t stride, int64_t outputs, int64_t depth,
                          uint8_t* panels);
  bool int8_alike;  // eight-bit codes are multiplied as fast as two-bit ones
  int32_t (*total)(const int8_t* codes, int64_t length);
  void (*finish)(const Epilogue& epilogue);
  // Multiplies in registers alone; returns how many multiplications and additions it did.
  int64_t (*busy)(int64_t turns, int32_t* sink);
};

extern const Path kAmxPath, kAvx512Path, kAvxVnniPath, kAvx2Path;  // x86
extern const Path kI8mmPath, kDotprodPath, kNeonPath;              // Arm
extern const Path kPortablePath;

// Fastest first; the last one runs everywhere.
extern const Path* const kPaths[];
extern const int kPathCount;

}  // namespace bitnet
