// The operations on whole arrays: they cut the work into pieces, threads take them, and a
// path does each. No XLA here: ffi.cc opens these to it, tests/native drives them alone.

#pragma once

#include "path.h"
#include "threads.h"

namespace bitnet {

// The path that all threads take: the fastest that this processor runs, or the one chosen.
const Path& Chosen();
void Choose(const Path& path);

// The constants that may be changed while the library runs, of Tuning in its order, and whether a
// path takes a value of one: that is what it is then.
constexpr int kConstants = 3;
std::atomic<int64_t>& ConstantOf(const Path& path, int constant);
bool Tune(const Path& path, int constant, int64_t value);

// Activations (rows, length), each row in `groups` of a gamma of its own, to codes
// (rows, stride) with zeros behind them, and gamma (rows, groups). Each `block` of a row is
// rotated first, times `factor`; a block of 1 is not.
struct Rotation {
  int64_t block;
  float factor;
};

template <class Float>
void QuantizeRows(Pool& pool, const Float* x, int64_t rows, int64_t length, Rotation rotation,
                  int64_t groups, int64_t stride, float qmax, float eps, int8_t* codes,
                  float* gamma);

// A batch of products.
//   x       (batch, rows, stride) codes, `groups` times `depth` of each row
//   panels  (batch, groups, Panels(outputs), ByteRows(kind, depth), 64), layout.h; null where
//   stored  codes of eight bits are multiplied as they are stored: ternary ones, (batch, groups,
//           depth, outputs), or int8 ones in one group, which may be (batch, outputs, depth)
//   parts   that each group is summed in: 1, or of whole fours
struct Product {
  Kind kind;
  int64_t batch, rows, outputs, groups, depth, parts;
  const int8_t* x;
  int64_t stride;
  const uint8_t* panels;
  const int8_t* stored = nullptr;
  bool transposed = false;

  int64_t Sums() const { return groups * parts; }  // of one row and output
};

// sums (batch, product.Sums(), rows, outputs) int32.
void MultiplyToSums(Pool& pool, const Product& product, int32_t* sums);

// The scales of a product: gamma (batch, rows, gammas), where `gammas` divides
// product.Sums(), and scale (batch, groups, scales), where `scales` is 1 or `outputs`.
struct Scales {
  const float* gamma;
  int64_t gammas;
  const float* scale;
  int64_t scales;
  float qmax;
};

// y (batch, rows, outputs): the epilogue of each sum, in ascending order, float32 or bfloat16.
template <class Float>
void Multiply(Pool& pool, const Product& product, const Scales& scales, Float* y);

// A batch of stored kernels to panels, as LayOutTernary and Path::lay_out. Ternary: (batch, rows,
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
