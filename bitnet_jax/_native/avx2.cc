#include "target.h"

#ifdef BITNET_X86

BITNET_TARGET("avx2")

#include "ymm.h"

namespace bitnet {
namespace {

struct Avx2 : Ymm {
  static constexpr int kTileRows = 4, kTilePanels = 1;
  static constexpr int64_t kDirectRows = 8;
  // Pairs of ternary products are summed in int16, 2 * 2 * 127 each: 64 of them fit.
  static constexpr int64_t kStepRows = kBlockRows;
  static constexpr uint32_t kBias[2] = {1, 0};

  static __m256i Wide(__m256i pairs) {
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }

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

bool HasAvx2() { return __builtin_cpu_supports("avx2"); }

}  // namespace

const Path kAvx2Path = PathOf<Avx2>("avx2", HasAvx2);

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_X86
