#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "product.h"

namespace bitnet {
namespace {

constexpr int64_t kRows = 64;  // of a piece whose codes are written

const KernelQuantizer<float>& Of(const Path& path, const float*) { return path.kernel; }
const KernelQuantizer<BFloat16>& Of(const Path& path, const BFloat16*) {
  return path.kernel_bfloat16;
}

// What codes are compared with, from a mean of |w| * kShift.
float StatisticOf(float mean, float eps) {
  constexpr float kUnshift = 1.0f / kShift, kLargest = 0x1.fffffep127f * kShift;
  // Rounding does not carry a mean past the largest float; Inf and NaN stay what they are.
  if (std::isfinite(mean)) mean = std::min(mean, kLargest);
  const float statistic = mean * kUnshift;
  return statistic < eps ? eps : statistic;
}

// A halving tree over adjacent pairs; what is missing at the end counts as 0.
float PairSum(float* values, int64_t count) {
  for (; count > 1; count = (count + 1) / 2) {
    for (int64_t i = 0; i < count / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    if (count % 2 != 0) values[count / 2] = values[count - 1];
  }
  return values[0];
}

void CountKept(const int8_t* codes, int64_t rows, int64_t stride, int64_t columns,
               int32_t* counts) {
  std::fill(counts, counts + columns, 0);
  for (int64_t row = 0; row < rows; ++row) {
    const int8_t* from = codes + row * stride;
    for (int64_t c = 0; c < columns; ++c) counts[c] += from[c] & 1;
  }
}

}  // namespace

template <class Float>
void QuantizeKernel(Pool& pool, const Ternarized& kernel, const Float* w, int8_t* codes,
                    float* scale) {
  const int64_t n = kernel.outputs, size = kernel.rows * n, scales = kernel.across ? 1 : n;
  if (kernel.slices * size == 0) return;
  const KernelQuantizer<Float>& path = Of(Chosen(), w);
  const int64_t threads = ThreadsFor(pool, kernel.slices * size / kFloatsPerUnit);
  std::vector<float> sums(kernel.across ? kernel.slices * n : 0);
  std::vector<int32_t> kept(kernel.survivors ? kernel.slices * n : 0);

  // The mean of all weights, or of those that are kept, of a slice or of some columns of it.
  const float reciprocal =
      static_cast<float>(1.0 / static_cast<double>(kernel.across ? size : kernel.rows));
  const auto statistic = [&](float sum, const int32_t* count) {
    const float mean = count == nullptr ? sum * reciprocal
                                        : sum / static_cast<float>(std::max(*count, int32_t{1}));
    return StatisticOf(mean, kernel.eps);
  };
  const auto measure = [&](bool survivors) {
    const int64_t blocks = CeilDiv(n, kColumns);
    ParallelFor(pool, kernel.slices * blocks, threads, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t slice = piece / blocks, column = piece % blocks * kColumns;
        const int64_t count = std::min(kColumns, n - column), at = slice * size + column;
        float* to = (kernel.across ? sums.data() : scale) + slice * n + column;
        path.sum(w + at, survivors ? codes + at : nullptr, kernel.rows, count, n, to);
        int32_t* counts = survivors ? kept.data() + slice * n + column : nullptr;
        if (survivors) CountKept(codes + at, kernel.rows, n, count, counts);
        if (kernel.across) continue;
        for (int64_t c = 0; c < count; ++c) {
          to[c] = statistic(to[c], survivors ? counts + c : nullptr);
        }
      }
    });
    for (int64_t slice = 0; kernel.across && slice < kernel.slices; ++slice) {
      const float sum = PairSum(sums.data() + slice * n, n);
      int32_t total = 0;
      for (int64_t c = 0; survivors && c < n; ++c) total += kept[slice * n + c];
      scale[slice] = statistic(sum, survivors ? &total : nullptr);
    }
  };

  measure(/*survivors=*/false);
  const int64_t runs = CeilDiv(kernel.rows, kRows);
  ParallelFor(pool, kernel.slices * runs, threads, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t slice = piece / runs, row = piece % runs * kRows;
      const int64_t at = slice * size + row * n;
      path.codes(w + at, scale + slice * scales, kernel.across ? 0 : 1,
                 std::min(kRows, kernel.rows - row), n, kernel.threshold, codes + at);
    }
  });
  if (kernel.survivors) measure(/*survivors=*/true);
}

template void QuantizeKernel(Pool&, const Ternarized&, const float*, int8_t*, float*);
template void QuantizeKernel(Pool&, const Ternarized&, const BFloat16*, int8_t*, float*);

}  // namespace bitnet
