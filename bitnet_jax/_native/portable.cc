// What any compiler takes: the definition of the sums, loop by loop.

#include "plain.h"
#include "quantize_kernel.h"

namespace bitnet {
namespace {

void PortableInt8(const Rows& x, const Beside& codes, int32_t* sums) {
  for (int64_t m = 0; m < x.count; ++m) {
    for (int64_t p = 0; p < codes.count; ++p) {
      int32_t* to = sums + m * kWidth + p * kOutputs;
      int32_t total[kOutputs] = {};
      if (x.totals == nullptr) std::memcpy(total, to, sizeof(total));
      for (int64_t q = 0; q < codes.fours.count; ++q) {
        const int64_t row = codes.fours.first + q;
        const uint8_t* byte = codes.panels + (row * codes.count + p) * kRowBytes;
        const int8_t* four = x.codes + m * x.stride + 4 * q;
        for (int64_t l = 0; l < kOutputs; ++l) {
          for (int64_t i = 0; i < 4; ++i, ++byte) total[l] += (*byte - 128) * four[i];
        }
      }
      std::memcpy(to, total, sizeof(total));
    }
  }
}

void PortableTernary(const Rows& x, const Beside& codes, int32_t* sums) {
  for (int64_t m = 0; m < x.count; ++m) {
    for (int64_t p = 0; p < codes.count; ++p) {
      int32_t total[kOutputs] = {};
      for (int64_t q = 0; q < codes.fours.count; ++q) {
        const int64_t at = codes.fours.first + q;
        const int64_t start = at / (kFields * kBlockRows) * kBlockRows;
        const int64_t left = codes.byte_rows - start, rows = left < kBlockRows ? left : kBlockRows;
        const int64_t inside = at - kFields * start, shift = 2 * (inside / rows);
        const int64_t row = start + inside % rows;
        const uint8_t* byte = codes.panels + (row * codes.count + p) * kRowBytes;
        const int8_t* four = x.codes + m * x.stride + 4 * q;
        for (int64_t l = 0; l < kOutputs; ++l) {
          for (int64_t i = 0; i < 4; ++i, ++byte) total[l] += ((*byte >> shift) & 3) * four[i];
        }
      }
      for (int64_t l = 0; l < kOutputs; ++l) {
        sums[m * kWidth + p * kOutputs + l] = total[l] - x.totals[m];
      }
    }
  }
}

bool Always() { return true; }

int64_t PortableBusy(int64_t turns, int32_t* sink) {
  int32_t total[kOutputs] = {};
  for (int64_t t = 0; t < turns; ++t) {
    for (int64_t l = 0; l < kOutputs; ++l) total[l] += static_cast<int8_t>(t) * (l + 1);
  }
  *sink += total[0];
  return turns * kOutputs * 2;
}

Tuning tuning = {0, 64, 0};

}  // namespace

const Path kPortablePath = {"portable",
                            Always,
                            &tuning,
                            /*most_step_rows=*/0,
                            PortableTernary,
                            PortableInt8,
                            QuantizeRow<float>,
                            QuantizeRow<BFloat16>,
                            RotateRow,
                            kKernelQuantizer<float>,
                            kKernelQuantizer<BFloat16>,
                            LayOutInt8,
                            LayOutTernaryCodes,
                            /*int8_alike=*/false,
                            TotalOf,
                            Finish,
                            PortableBusy};

}  // namespace bitnet
