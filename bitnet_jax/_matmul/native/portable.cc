// What any compiler takes: the definition of the sums, loop by loop.

#include "plain.h"

namespace bitnet {
namespace {

void PortableInt8(const Rows& x, const uint8_t* panels, int64_t byte_rows, int64_t panel_count,
                  int32_t* sums) {
  for (int64_t m = 0; m < x.count; ++m) {
    for (int64_t p = 0; p < panel_count; ++p) {
      int32_t total[kOutputs] = {};
      for (int64_t r = 0; r < byte_rows; ++r) {
        const uint8_t* byte = panels + (r * panel_count + p) * kRowBytes;
        const int8_t* four = x.codes + m * x.stride + 4 * r;
        for (int64_t l = 0; l < kOutputs; ++l) {
          for (int64_t i = 0; i < 4; ++i, ++byte) total[l] += (*byte - 128) * four[i];
        }
      }
      std::memcpy(sums + m * kWidth + p * kOutputs, total, sizeof(total));
    }
  }
}

void PortableTernary(const Rows& x, const uint8_t* panels, int64_t byte_rows, int64_t panel_count,
                     int32_t* sums) {
  for (int64_t m = 0; m < x.count; ++m) {
    for (int64_t p = 0; p < panel_count; ++p) {
      int32_t total[kOutputs] = {};
      for (int64_t start = 0; start < byte_rows; start += kBlockRows) {
        const int64_t rows = byte_rows - start < kBlockRows ? byte_rows - start : kBlockRows;
        for (int64_t r = 0; r < rows; ++r) {
          const uint8_t* byte = panels + ((start + r) * panel_count + p) * kRowBytes;
          const int8_t* four = x.codes + m * x.stride + RowDepth(Kind::kTernary) * start + 4 * r;
          for (int64_t l = 0; l < kOutputs; ++l) {
            for (int64_t i = 0; i < 4; ++i, ++byte) {
              for (int64_t j = 0; j < kFields; ++j) {
                total[l] += ((*byte >> (2 * j)) & 3) * four[4 * rows * j + i];
              }
            }
          }
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

}  // namespace

const Path kPortablePath = {"portable",
                            Always,
                            /*slab=*/64,
                            PortableTernary,
                            PortableInt8,
                            QuantizeRow<float>,
                            QuantizeRow<BFloat16>,
                            TotalOf,
                            Finish,
                            PortableBusy};

}  // namespace bitnet
