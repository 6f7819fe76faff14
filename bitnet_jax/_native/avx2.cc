#include "target.h"

#ifdef BITNET_X86

BITNET_TARGET("avx2")

#include "ymm.h"

namespace bitnet {
namespace {

struct Avx2 : Ymm {
  // 8 sums, 2 vectors of codes, one of x and what products take in 16 registers. One thread, 128
  // rows: 16.0 ms; 3 by 1 takes 16.2, 6 by 1 17.3.
  static constexpr int kTileRows = 4, kTilePanels = 1;
  // 2 rows .17 ms, unpacked .34; 4 rows .24 against .47. From 8 on the two are as fast within
  // noise.
  static constexpr int64_t kDirectRows = 8;
  // Pairs of ternary products are summed in int16, 2 * 2 * 127 each: 64 of them fit.
  static constexpr int64_t kMostStepRows = kBlockRows, kStepRows = kMostStepRows;
  static constexpr bool kInt8Alike = false;
  static constexpr uint32_t kBias[2] = {1, 0};

  static __m256i Wide(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

  template <Kind>
  struct Total : Sums<Int16s> {
    void Add(Row codes, Activations x) {
      low = Of(_mm256_add_epi16(Raw(low), _mm256_maddubs_epi16(codes.low, x)));
      high = Of(_mm256_add_epi16(Raw(high), _mm256_maddubs_epi16(codes.high, x)));
      InOrder(low, high);
    }
    void AddTo(int32_t* to) const { Ymm::AddTo(to, {Wide(Raw(low)), Wide(Raw(high))}); }
  };

  static void OneRow(const Rows& x, Panel codes, int64_t byte_rows, int32_t* sums) {
    for (int64_t start = 0; start < byte_rows; start += kStepRows) {
      Add<Avx2, From::kPacked>(x, start * RowDepth(Kind::kTernary), codes.Down(start),
                               Least(byte_rows - start, kStepRows), kPanels, sums);
    }
  }
};

// A pair of int8 products just fits in int16, as |code| times the activation with its sign.
template <>
struct Avx2::Total<Kind::kInt8> : Ymm::Sums<Int32s> {
  static __m256i Products(__m256i codes, Activations x) {
    codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    return Wide(_mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes)));
  }
  void Add(Row codes, Activations x) {
    low = Of(_mm256_add_epi32(Raw(low), Products(codes.low, x)));
    high = Of(_mm256_add_epi32(Raw(high), Products(codes.high, x)));
  }
  void AddTo(int32_t* to) const { Ymm::AddTo(to, {Raw(low), Raw(high)}); }
};

// Many rows of x and int8 codes: both widened to int16 once, for a product of pairs takes fewer
// instructions than one of bytes with signs. A byte row becomes two rows: the even weights of
// each four, and the odd ones.
struct Wide : Ymm {
  // 12 sums, 2 vectors of codes and one of x in 16 registers. One thread, in L1: 230 GOP/s; 4 by 1
  // does 220, and bytes with signs 204.
  static constexpr int kTileRows = 6, kTilePanels = 1;

  template <Kind>
  struct Total : Sums<Int32s> {
    void Add(Row codes, Activations x) {
      low = Of(_mm256_add_epi32(Raw(low), _mm256_madd_epi16(codes.low, x)));
      high = Of(_mm256_add_epi32(Raw(high), _mm256_madd_epi16(codes.high, x)));
      InOrder(low, high);
    }
    void AddTo(int32_t* to) const { Ymm::AddTo(to, {Raw(low), Raw(high)}); }
  };
};

// Rows from which on widening costs less than it gains. One thread: 6 rows 2.2 ms either way, 8
// rows 2.4 against 2.6 without, 128 rows 22 against 28.
constexpr int64_t kWidePays = 8;
// By count: so many rows of x take 24 KB, beside 8 KB of a panel.
constexpr int64_t kWideRows = 48;
constexpr int64_t kWideSteps = 4 * kBlockRows;   // byte rows at a time, as many fours of x
constexpr int64_t kWideStride = kWideSteps * 8;  // bytes

// Rows of signed bytes, each `fours` deep, to pairs of int16.
void WidenRows(const Rows& x, int64_t fours, int8_t* to) {
  for (int64_t m = 0; m < x.count; ++m) {
    const int8_t* row = x.codes + m * x.stride;
    for (int64_t q = 0; q < fours; q += 4) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 4 * q));
      const __m128i even = _mm_srai_epi16(_mm_slli_epi16(v, 8), 8), odd = _mm_srai_epi16(v, 8);
      __m128i* pairs = reinterpret_cast<__m128i*>(to + m * kWideStride + 8 * q);
      _mm_storeu_si128(pairs, _mm_unpacklo_epi32(even, odd));
      _mm_storeu_si128(pairs + 1, _mm_unpackhi_epi32(even, odd));
    }
  }
}

inline __m256i Even(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
inline __m256i Odd(__m256i v) { return _mm256_srai_epi16(v, 8); }

void WidenPanels(Panel codes, int64_t byte_rows, int64_t panels, Unpacked& to) {
  const __m256i bias = _mm256_set1_epi8(-128);
  for (int64_t r = 0; r < byte_rows; ++r, codes = codes.Down(1)) {
    for (int64_t p = 0; p < panels; ++p) {
      const Ymm::Row biased = Ymm::Load(codes.Next(p).bytes);
      const __m256i low = _mm256_xor_si256(biased.low, bias);
      const __m256i high = _mm256_xor_si256(biased.high, bias);
      uint8_t* pairs = to.bytes + 2 * r * Unpacked::kRow + p * kRowBytes;
      Ymm::Write(pairs, {Even(low), Even(high)});
      Ymm::Write(pairs + Unpacked::kRow, {Odd(low), Odd(high)});
    }
  }
}

void WideSums(const Rows& x, const Beside& beside, int32_t* sums) {
  if (x.count < kWidePays) return Int8Sums<Avx2>(x, beside, sums);
  Begin<Avx2, Kind::kInt8>(x, sums);
  Unpacked codes;
  alignas(32) int8_t some[kWideRows * kWideStride];
  for (int64_t start = 0; start < beside.fours.count; start += kWideSteps) {
    const int64_t fours = Least(beside.fours.count - start, kWideSteps);
    WidenPanels(FromRow(beside, beside.fours.first + start), fours, beside.count, codes);
    for (int64_t m = 0; m < x.count; m += kWideRows) {
      const int64_t rows = Least(x.count - m, kWideRows);
      WidenRows({x.codes + m * x.stride + 4 * start, x.stride, rows, nullptr}, fours, some);
      Add<Wide, From::kFields>({some, kWideStride, rows, nullptr}, 0, codes.All(), 2 * fours,
                               beside.count, sums + m * kWidth);
    }
  }
}

bool HasAvx2() { return __builtin_cpu_supports("avx2"); }

constexpr Path MakePath() {
  Path path = PathOf<Avx2>("avx2", HasAvx2);
  path.int8 = WideSums;
  return path;
}

}  // namespace

const Path kAvx2Path = MakePath();

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_X86
