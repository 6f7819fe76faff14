// The operations on whole arrays: they cut the work into pieces, threads take them, and a
// path does each. No XLA here: ffi.cc opens these to it, tests/native drives them alone.

#pragma once

#include "path.h"
#include "threads.h"

namespace bitnet {

// The path that all threads take: the fastest that this processor runs, or the one chosen.
const Path& Chosen();
void Choose(const Path& path);

// Activations (rows, length) to codes (rows, stride) with zeros behind them, and gamma (rows).
template <class Float>
void QuantizeRows(Pool& pool, const Float* x, int64_t rows, int64_t length, int64_t stride,
                  float qmax, float eps, int8_t* codes, float* gamma);

// A batch of products.
//   x       (batch, rows, stride) codes, `groups` times `depth` of each row
//   panels  (batch, groups, Panels(outputs), ByteRows(kind, depth), 64), layout.h
struct Product {
  Kind kind;
  int64_t batch, rows, outputs, groups, depth;
  const int8_t* x;
  int64_t stride;
  const uint8_t* panels;
};

// sums (batch, groups, rows, outputs) int32.
void MultiplyToSums(Pool& pool, const Product& product, int32_t* sums);

// y (batch, rows, outputs): the epilogue of each group, in ascending order, float32 or
// bfloat16. gamma (batch, rows), scale (batch, groups, scales), scales 1 or `outputs`.
template <class Float>
void Multiply(Pool& pool, const Product& product, const float* gamma, const float* scale,
              int64_t scales, float qmax, Float* y);

// A batch of stored kernels to panels, as LayOutTernary and LayOutInt8. Ternary: (batch, rows,
// outputs) bytes; int8: (batch, depth, outputs) codes, or (batch, outputs, depth) transposed.
struct Stored {
  Kind kind;
  const void* codes;
  int64_t batch, rows, outputs;
  int64_t last, groups, depth;
  bool transposed;
};

void LayOut(Pool& pool, const Stored& stored, uint8_t* panels);

// Reads `bytes` bytes in `streams` (1 or kPanels) streams a thread; returns their sum.
uint64_t Read(Pool& pool, const uint8_t* from, int64_t bytes, int64_t streams);

// All threads multiply in registers alone; returns the operations they did together.
int64_t Busy(Pool& pool, int64_t turns);

}  // namespace bitnet
