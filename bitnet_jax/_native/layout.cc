#include "layout.h"

#include <algorithm>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "byte i of four is written as bits 8 i and up of a word"
#endif

namespace bitnet {
namespace {

// Four bytes, each with four fields: field i of byte j becomes field j of byte i.
inline uint32_t TransposeFields(uint32_t w) {
  uint32_t t = (w ^ (w >> 6)) & 0x00CC00CCu;
  w ^= t ^ (t << 6);
  t = (w ^ (w >> 12)) & 0x0000F0F0u;
  return w ^ t ^ (t << 12);
}

}  // namespace

void LayOutTernary(const uint8_t* stored, int64_t outputs, int64_t last, int64_t depth,
                   int64_t group, int64_t panel, uint8_t* to, int64_t to_row) {
  const int64_t first = panel * kOutputs, taken = std::min(kOutputs, outputs - first);
  const int64_t rows = ByteRows(Kind::kTernary, depth);
  const int64_t stored_last = CeilDiv(last, kFields);
  // Four adjacent weights share a stored byte where neither a group nor `last` cuts them.
  const bool whole_bytes = last % kFields == 0 && depth % kFields == 0;
  for (int64_t row = 0; row < rows; ++row, to += to_row) {
    const int64_t start = row / kBlockRows * kBlockRows;
    const int64_t field_depth = 4 * std::min(kBlockRows, rows - start);
    const int64_t k = kFields * 4 * start + 4 * (row - start);  // of field 0
    uint32_t quads[kOutputs] = {};
    for (int64_t j = 0; j < kFields; ++j) {
      const int64_t from = k + field_depth * j, left = depth - from;
      if (left <= 0) break;
      if (whole_bytes) {
        const int64_t at = group * depth + from;
        const int64_t byte_row = at / last * stored_last + at % last / kFields;
        const uint8_t* bytes = stored + byte_row * outputs + first;
        for (int64_t l = 0; l < taken; ++l) quads[l] |= uint32_t{bytes[l]} << (8 * j);
        continue;
      }
      for (int64_t i = 0; i < std::min(left, int64_t{4}); ++i) {
        const int64_t at = group * depth + from + i, inner = at % last;
        const uint8_t* bytes =
            stored + (at / last * stored_last + inner / kFields) * outputs + first;
        for (int64_t l = 0; l < taken; ++l) {
          const uint32_t field = (bytes[l] >> (2 * (inner % kFields))) & 3;
          quads[l] |= field << (8 * j + 2 * i);
        }
      }
    }
    for (int64_t l = 0; l < kOutputs; ++l) quads[l] = TransposeFields(quads[l]);
    std::memcpy(to, quads, kRowBytes);
  }
}

}  // namespace bitnet
