#include "target.h"

#ifdef BITNET_ARM

#include "neon.h"

namespace bitnet {
namespace {

// Every AArch64 processor: products of bytes are summed in int16.
struct Baseline : Neon {
  using Activations = int8x16_t;
  // 24 sums of 8 int16, 4 vectors of codes and one of x in 32 registers.
  static constexpr int kTileRows = 3, kTilePanels = 1;
  static constexpr bool kInt8Alike = false;
  static constexpr int kIndependent = 3;
  static constexpr int64_t kDirectRows = 2;
  // Ternary products are at most 2 * 127: 128 of them fit.
  static constexpr int64_t kMostStepRows = 2 * kBlockRows, kStepRows = kMostStepRows;

  static Activations Every(const int8_t* x) { return vreinterpretq_s8_s32(vdupq_n_s32(Four(x))); }

  // A lane each for the four products of an output.
  struct Lanes {
    int16x8_t low, high;
    BITNET_INLINE void Add(uint8x16_t codes, Activations x) {
      const int8x16_t c = vreinterpretq_s8_u8(codes);
      low = vmlal_s8(low, vget_low_s8(c), vget_low_s8(x));
      high = vmlal_high_s8(high, c, x);
    }
    BITNET_INLINE int32x4_t Whole() const {
      return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
    }
  };

  template <Kind>
  struct Total {
    Lanes a, b, c, d;
    BITNET_INLINE void Add(Row codes, Activations x) {
      a.Add(codes.a, x);
      b.Add(codes.b, x);
      c.Add(codes.c, x);
      d.Add(codes.d, x);
    }
    BITNET_INLINE void AddTo(int32_t* to) const {
      AddFour(to, a.Whole());
      AddFour(to + 4, b.Whole());
      AddFour(to + 8, c.Whole());
      AddFour(to + 12, d.Whole());
    }
  };

  // Two panels at a time, for registers hold the sums of no more.
  static void OneRow(const Rows& x, Panel codes, int64_t byte_rows, int32_t* sums) {
    for (int64_t start = 0; start < byte_rows; start += kStepRows) {
      const int64_t rows = Least(byte_rows - start, kStepRows);
      const int8_t* at = x.codes + start * RowDepth(Kind::kTernary);
      for (int64_t p = 0; p < kPanels; p += 2) {
        Direct<Baseline, 1, 2>(at, 0, codes.Down(start).Next(p), rows, sums + p * kOutputs);
      }
    }
  }
};

// Two int8 products just fit in int16.
template <>
struct Baseline::Total<Kind::kInt8> {
  int32x4_t a, b, c, d;
  static BITNET_INLINE int32x4_t Sum(int32x4_t sum, uint8x16_t codes, Activations x) {
    const int8x16_t signed_codes = Signed<Kind::kInt8>(codes);
    const int16x8_t low = vmull_s8(vget_low_s8(signed_codes), vget_low_s8(x));
    return vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(signed_codes, x)));
  }
  BITNET_INLINE void Add(Row codes, Activations x) {
    a = Sum(a, codes.a, x);
    b = Sum(b, codes.b, x);
    c = Sum(c, codes.c, x);
    d = Sum(d, codes.d, x);
  }
  BITNET_INLINE void AddTo(int32_t* to) const {
    AddFour(to, a);
    AddFour(to + 4, b);
    AddFour(to + 8, c);
    AddFour(to + 12, d);
  }
};

bool Always() { return true; }

}  // namespace

const Path kNeonPath = PathOf<Baseline>("neon", Always);

}  // namespace bitnet

#endif  // BITNET_ARM
