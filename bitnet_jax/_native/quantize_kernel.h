// A kernel (rows, columns) of floats to ternary codes, as _quantize/ternary.py does it in plain
// JAX, to the bit. What a compiler vectorises by itself, along the outputs; see plain.h.

#pragma once

#include <algorithm>
#include <cmath>

#include "plain.h"
#include "target.h"

namespace bitnet {
namespace {

constexpr int kRun = 16;  // rows that are summed together: four levels of the tree

constexpr float kHuge = 0x1p100f;  // statistics above it are scaled down before their reciprocal

// What a row adds to the sums of its columns.
template <class Float>
struct Magnitudes {
  const Float* rows[kRun];
  BITNET_INLINE float At(int row, int64_t column) const {
    return std::fabs(AsFloat(rows[row][column])) * kShift;
  }
};

template <class Float>
struct Kept : Magnitudes<Float> {
  const int8_t* codes[kRun];
  // What is not kept is finite, so that times 0 it is 0.
  BITNET_INLINE float At(int row, int64_t column) const {
    return Magnitudes<Float>::At(row, column) * static_cast<float>(codes[row][column] & 1);
  }
};

struct Sums16 {
  const float* rows[kRun];
  BITNET_INLINE float At(int row, int64_t column) const { return rows[row][column]; }
};

// Adjacent pairs, then pairs of pairs.
template <int N, class Values>
BITNET_INLINE float PairSum(const Values& values, int first, int64_t column) {
  if constexpr (N == 1) {
    return values.At(first, column);
  } else {
    return PairSum<N / 2>(values, first, column) + PairSum<N / 2>(values, first + N / 2, column);
  }
}

template <class Values>
void SumRun(const Values& from, int64_t columns, float* __restrict to) {
  const Values values = from;  // nothing that is written can change it
  for (int64_t c = 0; c < columns; ++c) to[c] = PairSum<kRun>(values, 0, c);
}

// Sums of columns by a halving tree over adjacent rows: sixteen rows at a time, then sixteen
// such sums. What is missing at the end counts as rows of zeros, which change no sum.
class Tree {
 public:
  explicit Tree(int64_t columns) : columns_(columns) {}

  // Where the sum of the next sixteen rows goes.
  float* Next(int level = 0) {
    if (filled_[level] == kRun) Carry(level);
    return At(level, filled_[level]++);
  }

  void Total(float* to) {
    for (int level = 0; level < kLevels; ++level) {
      int64_t above = 0;
      for (int l = level + 1; l < kLevels; ++l) above += filled_[l];
      if (above == 0 && filled_[level] == 1) {
        std::memcpy(to, At(level, 0), columns_ * sizeof(float));
        return;
      }
      if (filled_[level] > 0) Carry(level);
    }
  }

 private:
  static constexpr int kLevels = 8;  // 16^9 rows

  float* At(int level, int64_t run) { return sums_ + (level * kRun + run) * kColumns; }

  void Carry(int level) {
    Sums16 sums;
    for (int i = 0; i < kRun; ++i) sums.rows[i] = i < filled_[level] ? At(level, i) : zeros_;
    filled_[level] = 0;
    SumRun(sums, columns_, Next(level + 1));
  }

  int64_t columns_;
  int64_t filled_[kLevels + 1] = {};
  float zeros_[kColumns] = {};
  float sums_[(kLevels + 1) * kRun * kColumns];
};

template <class Float>
void SumColumnsOf(const Float* w, const int8_t* codes, int64_t rows, int64_t columns,
                  int64_t stride, float* sums) {
  static const Float no_weights[kColumns] = {};
  static const int8_t no_codes[kColumns] = {};
  Tree tree(columns);
  for (int64_t row = 0; row < rows; row += kRun) {
    Kept<Float> kept;
    for (int i = 0; i < kRun; ++i) {
      const bool there = row + i < rows;
      kept.rows[i] = there ? w + (row + i) * stride : no_weights;
      kept.codes[i] = there && codes != nullptr ? codes + (row + i) * stride : no_codes;
    }
    float* to = tree.Next();
    const Magnitudes<Float>& all = kept;
    codes != nullptr ? SumRun(kept, columns, to) : SumRun(all, columns, to);
  }
  tree.Total(sums);
}

template <class Float>
void TernaryCodesOf(const Float* w, const float* statistics, int64_t step, int64_t rows,
                    int64_t columns, float threshold, int8_t* codes) {
  float shift[kColumns], inverse[kColumns];
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t count = std::min(kColumns, columns - first);
    for (int64_t c = 0; c < count; ++c) {
      const float statistic = statistics[(first + c) * step];
      // Its reciprocal underflows for the largest floats, unless both factors are shifted.
      shift[c] = statistic > kHuge ? kShift : 1.0f;
      inverse[c] = 1.0f / (statistic * shift[c]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const Float* from = w + row * columns + first;
      int8_t* __restrict to = codes + row * columns + first;
      for (int64_t c = 0; c < count; ++c) {
        const float r = (AsFloat(from[c]) * shift[c]) * inverse[c];
        // Not |r| > threshold: a NaN is kept, and its code is 1.
        const int kept = !(std::fabs(r) <= threshold);
        to[c] = static_cast<int8_t>(kept - 2 * (kept & (r < 0.0f)));
      }
    }
  }
}

template <class Float>
constexpr KernelQuantizer<Float> kKernelQuantizer = {SumColumnsOf<Float>, TernaryCodesOf<Float>};

}  // namespace
}  // namespace bitnet
