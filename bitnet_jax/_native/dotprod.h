// The dot product of Armv8.2: fours of bytes, summed in int32. Included under its own target
// by dotprod.cc, and by i8mm.cc, which takes its few rows.

#pragma once

#include "neon.h"

namespace bitnet {
namespace {

struct Dotprod : Neon {
  using Activations = int8x8_t;  // in its first four bytes: the instruction takes them from there
  // 24 sums, 4 vectors of codes and those of x in 32 registers. Six rows a pass unpack once.
  static constexpr int kTileRows = 6, kTilePanels = 1;
  static constexpr int64_t kDirectRows = 6;
  static constexpr int64_t kMostStepRows = kWhole, kStepRows = 4 * kBlockRows;

  static Activations Every(const int8_t* x) { return vcreate_s8(static_cast<uint32_t>(Four(x))); }

  template <Kind kind>
  struct Total {
    int32x4_t a, b, c, d;
    BITNET_INLINE void Add(Row codes, Activations x) {
      a = vdotq_lane_s32(a, Signed<kind>(codes.a), x, 0);
      b = vdotq_lane_s32(b, Signed<kind>(codes.b), x, 0);
      c = vdotq_lane_s32(c, Signed<kind>(codes.c), x, 0);
      d = vdotq_lane_s32(d, Signed<kind>(codes.d), x, 0);
    }
    BITNET_INLINE void AddTo(int32_t* to) const {
      AddFour(to, a);
      AddFour(to + 4, b);
      AddFour(to + 8, c);
      AddFour(to + 12, d);
    }
  };

  // All fields of a byte row.
  static BITNET_INLINE void AddFields(Total<Kind::kTernary>& sums, const uint8_t* row,
                                      const Activations (&x)[kFields]) {
    Prefetch(row);
    const Row bytes = Load(row);
    sums.Add(Field<0>(bytes), x[0]);
    sums.Add(Field<1>(bytes), x[1]);
    sums.Add(Field<2>(bytes), x[2]);
    sums.Add(Field<3>(bytes), x[3]);
  }

  // Four panels one after the other, for sums leave no room for the bytes of all.
  static void OneRow(const Rows& rows_of_x, Panel codes, int64_t byte_rows, int32_t* sums) {
    const int8_t* x = rows_of_x.codes;
    Total<Kind::kTernary> a{}, b{}, c{}, d{};
    for (int64_t start = 0; start < byte_rows; start += kBlockRows) {
      const int64_t rows = Least(byte_rows - start, kBlockRows), field_depth = 4 * rows;
      for (int64_t r = 0; r < rows; ++r, x += 4, codes.bytes += codes.row) {
        const Activations fields[kFields] = {Every(x), Every(x + field_depth),
                                             Every(x + 2 * field_depth),
                                             Every(x + 3 * field_depth)};
        AddFields(a, codes.bytes, fields);
        AddFields(b, codes.bytes + kRowBytes, fields);
        AddFields(c, codes.bytes + 2 * kRowBytes, fields);
        AddFields(d, codes.bytes + 3 * kRowBytes, fields);
      }
      x += 3 * field_depth;
    }
    a.AddTo(sums);
    b.AddTo(sums + kOutputs);
    c.AddTo(sums + 2 * kOutputs);
    d.AddTo(sums + 3 * kOutputs);
  }
};

}  // namespace
}  // namespace bitnet
