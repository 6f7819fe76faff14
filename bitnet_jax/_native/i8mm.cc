// Int8 matrix products of Armv8.6: two rows of x by two outputs, eight weights deep.
//
// From kMatrixRows rows on, panels lie in the int8 layout, unpacked or as they are, and are
// then paired: of two byte rows, eight weights deep together, the fours of each output are
// put side by side, so that a vector is two outputs, as an operand wants them. Fewer rows are
// left to the dot product, which every processor with i8mm has.

#include "target.h"

#ifdef BITNET_I8MM

#include "arm_has.h"

BITNET_TARGET(BITNET_I8MM)

#include "dotprod.h"

namespace bitnet {
namespace {

// Pairing costs as much as is gained up to about here: 3 instructions to a vector of codes,
// of which a dot product takes one for each row, and a matrix product one for two rows.
constexpr int64_t kMatrixRows = 8;
constexpr int64_t kPairDepth = 8;  // weights

using Row = Neon::Row;

template <Kind kind>
Row Pair(uint8x16_t first, uint8x16_t second, uint8x16_t third, uint8x16_t fourth) {
  const auto fours = [](uint8x16_t codes) {
    return vreinterpretq_u32_s8(Neon::Signed<kind>(codes));
  };
  const uint32x4_t a = fours(first), b = fours(second), c = fours(third), d = fours(fourth);
  return {vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b)),
          vreinterpretq_u8_u32(vzip1q_u32(c, d)), vreinterpretq_u8_u32(vzip2q_u32(c, d))};
}

// `rows` byte rows of the int8 layout, as signed bytes and in pairs: outputs 0 to 7 where the
// first of the two was, the other outputs in the next row. A last row is paired with zeros.
template <Kind kind>
void PairRows(Panel from, int64_t rows, int64_t panels, Unpacked& to) {
  const uint8x16_t zero = vdupq_n_u8(kind == Kind::kInt8 ? 128 : 0);
  for (int64_t r = 0; r < rows; r += 2) {
    const uint8_t* at = from.Down(r).bytes;
    uint8_t* pair = to.bytes + r * Unpacked::kRow;
    for (int64_t p = 0; p < panels; ++p, at += kRowBytes, pair += kRowBytes) {
      const Row a = Neon::Load(at);
      const Row b = r + 1 < rows ? Neon::Load(at + from.row) : Row{zero, zero, zero, zero};
      Neon::Write(pair, Pair<kind>(a.a, b.a, a.b, b.b));
      Neon::Write(pair + Unpacked::kRow, Pair<kind>(a.c, b.c, a.d, b.d));
    }
  }
}

// Sums of two rows of x and 8 outputs.
struct Half {
  int32x4_t a, b, c, d;

  BITNET_INLINE void Add(Row codes, int8x16_t x) {
    a = vmmlaq_s32(a, x, vreinterpretq_s8_u8(codes.a));
    b = vmmlaq_s32(b, x, vreinterpretq_s8_u8(codes.b));
    c = vmmlaq_s32(c, x, vreinterpretq_s8_u8(codes.c));
    d = vmmlaq_s32(d, x, vreinterpretq_s8_u8(codes.d));
  }
  static BITNET_INLINE void AddFour(int32_t* first, int32_t* second, int32x4_t a, int32x4_t b) {
    const int64x2_t twos_a = vreinterpretq_s64_s32(a), twos_b = vreinterpretq_s64_s32(b);
    Neon::AddFour(first, vreinterpretq_s32_s64(vzip1q_s64(twos_a, twos_b)));
    Neon::AddFour(second, vreinterpretq_s32_s64(vzip2q_s64(twos_a, twos_b)));
  }
  BITNET_INLINE void AddTo(int32_t* first, int32_t* second) const {
    AddFour(first, second, a, b);
    AddFour(first + 4, second + 4, c, d);
  }
};

// Two rows of x, and of sums.
struct Two {
  const int8_t* first;
  const int8_t* second;
  int32_t* sums;
  int32_t* second_sums;

  BITNET_INLINE int8x16_t Take() {
    const int8x16_t x = vcombine_s8(vld1_s8(first), vld1_s8(second));
    first += kPairDepth;
    second += kPairDepth;
    return x;
  }
};

struct PairSums {
  Half low{}, high{};

  BITNET_INLINE void AddTo(const Two& rows) const {
    low.AddTo(rows.sums, rows.second_sums);
    high.AddTo(rows.sums + 8, rows.second_sums + 8);
  }
};

// Up to 2 * kTwos rows of x times one panel in pairs.
constexpr int kTwos = 3;

template <int Twos>
void MatrixTile(Two x, Two y, Two z, Panel codes, int64_t pairs) {
  PairSums p, q, r;
  for (int64_t i = 0; i < pairs; ++i, codes = codes.Down(2)) {
    int8x16_t of_x = x.Take(), of_y = of_x, of_z = of_x;
    if constexpr (Twos > 1) of_y = y.Take();
    if constexpr (Twos > 2) of_z = z.Take();
    const Row low = Neon::Load(codes.bytes);
    p.low.Add(low, of_x);
    if constexpr (Twos > 1) q.low.Add(low, of_y);
    if constexpr (Twos > 2) r.low.Add(low, of_z);
    const Row high = Neon::Load(codes.Down(1).bytes);
    p.high.Add(high, of_x);
    if constexpr (Twos > 1) q.high.Add(high, of_y);
    if constexpr (Twos > 2) r.high.Add(high, of_z);
  }
  p.AddTo(x);
  if constexpr (Twos > 1) q.AddTo(y);
  if constexpr (Twos > 2) r.AddTo(z);
}

// All rows of x, from weight k on, against `pairs` of `panels` panels.
void AddPairs(const Rows& x, int64_t k, const Unpacked& codes, int64_t pairs, int64_t panels,
              int32_t* sums) {
  int32_t nowhere[kOutputs] = {};  // where a second row goes that is none
  for (int64_t p = 0; p < panels; ++p) {
    const auto two = [&](int64_t m) {
      const int8_t* row = x.codes + m * x.stride + k;
      int32_t* to = sums + m * kWidth + p * kOutputs;
      const bool both = m + 1 < x.count;
      return Two{row, both ? row + x.stride : row, to, both ? to + kWidth : nowhere};
    };
    const Panel panel = codes.All().Next(p);
    int64_t m = 0;
    for (; m + 2 * kTwos - 1 <= x.count; m += 2 * kTwos) {
      MatrixTile<3>(two(m), two(m + 2), two(m + 4), panel, pairs);
    }
    if (m + 3 <= x.count) {
      MatrixTile<2>(two(m), two(m + 2), two(m), panel, pairs);
    } else if (m < x.count) {
      MatrixTile<1>(two(m), two(m), two(m), panel, pairs);
    }
  }
}

template <Kind kind>
void MatrixSums(const Rows& x, const Beside& beside, int32_t* sums) {
  constexpr bool kTernary = kind == Kind::kTernary;
  if (x.count < kMatrixRows) {
    return kTernary ? TernarySums<Dotprod>(x, beside, sums) : Int8Sums<Dotprod>(x, beside, sums);
  }
  Begin<Dotprod, kind>(x, sums);
  const Fours fours = beside.fours;
  Unpacked codes;
  constexpr int64_t kStep = kFields * kUnpackedRows;
  for (int64_t start = 0; start < fours.count; start += kStep) {
    const int64_t deep = Least(fours.count - start, kStep);
    if (kTernary) Unpack<Dotprod>(beside, {fours.first + start, deep}, codes);
    const Panel from = kTernary ? codes.All() : FromRow(beside, fours.first + start);
    PairRows<kind>(from, deep, beside.count, codes);
    AddPairs(x, 4 * start, codes, CeilDiv(deep, 2), beside.count, sums);
  }
}

int64_t MatrixBusy(int64_t turns, int32_t* sink) {
  uint8_t zeros[kRowBytes] = {};
  asm volatile("" : : "r"(zeros) : "memory");  // no compiler knows what they are
  const Row codes = Neon::Load(zeros);
  int8x16_t x = vreinterpretq_s8_u8(codes.a);
  Half a{}, b{}, c{}, d{}, e{}, f{};
  const auto add = [&](Half& half) {
    Neon::Opaque(x);  // so that no product is worked out once for all
    half.Add(codes, x);
  };
  for (int64_t t = 0; t < turns; ++t) add(a), add(b), add(c), add(d), add(e), add(f);
  int32_t sums[kOutputs] = {};
  const Half* const halves[] = {&a, &b, &c, &d, &e, &f};
  for (const Half* half : halves) half->AddTo(sums, sums + 8);
  for (const int32_t sum : sums) *sink += sum;
  return turns * 6 * 2 * 8 * kPairDepth * 2;
}

bool HasI8mm() { return ArmHas(Feature::kDotprod) && ArmHas(Feature::kI8mm); }

constexpr Path MakePath() {
  Path path = PathOf<Dotprod>("i8mm", HasI8mm);
  path.ternary = MatrixSums<Kind::kTernary>;
  path.int8 = MatrixSums<Kind::kInt8>;
  path.busy = MatrixBusy;
  return path;
}

}  // namespace

const Path kI8mmPath = MakePath();

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_I8MM
