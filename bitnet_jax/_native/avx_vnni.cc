#include "target.h"

#ifdef BITNET_AVX_VNNI

#include "cpu_has.h"

// The test driver runs this file where only AVX512-VNNI is there: the same instruction
// in another encoding.
#ifdef BITNET_TEST_AVX_VNNI_AS_AVX512
BITNET_TARGET("avx2,avx512f,avx512vl,avx512vnni")
#define BITNET_DOT _mm256_dpbusd_epi32
#else
BITNET_TARGET("avx2,avxvnni")
#define BITNET_DOT _mm256_dpbusd_avx_epi32
#endif

#include "ymm.h"

namespace bitnet {
namespace {

struct AvxVnni : Ymm {
  // 12 sums, 2 vectors of codes and one of x in 16 registers. One thread: 6 rows .42 ms, 128 rows
  // 12.7; 4 by 1 takes .56 and 13.2.
  static constexpr int kTileRows = 6, kTilePanels = 1;
  // 4 rows .36 ms, unpacked .60; 8 rows .69 against .95; 16 rows 1.5 against 2.9. At 32 and 64 the
  // two are as fast within noise.
  static constexpr int64_t kDirectRows = 32;
  // 64 KB of codes beside a tile of x. 128 rows: steps of 16 to 64 take 18.7 to 19.2 ms.
  static constexpr int64_t kMostStepRows = kWhole, kStepRows = 4 * kBlockRows;
  static constexpr bool kInt8Alike = true;
  static constexpr uint32_t kBias[2] = {1, 128};

  template <Kind>
  struct Total : Sums<Int32s> {
    void Add(Row codes, Activations x) {
      low = Dot(low, codes.low, x);
      high = Dot(high, codes.high, x);
      InOrder(low, high);
    }
    void AddTo(int32_t* to) const { Ymm::AddTo(to, {Raw(low), Raw(high)}); }
  };

  // One panel of a few blocks after the other. The codes are masked where they stand, as in
  // avx512.h, for a run that is far from an overflow.
  static void OneRow(const Rows& x, Panel codes, int64_t byte_rows, int32_t* sums) {
    constexpr int64_t kRun = 4 * kBlockRows;
    for (int64_t start = 0; start < byte_rows; start += kRun) {
      const int64_t rows = Least(byte_rows - start, kRun);
      for (int64_t p = 0; p < kPanels; ++p) {
        OnePanel(x.codes + start * RowDepth(Kind::kTernary), codes.Down(start).Next(p), rows,
                 sums + p * kOutputs);
      }
    }
  }

 private:
  // Sums of a field, 4^j times too large, for both halves of a panel.
  template <int j>
  struct Masked {
    Int32s low{}, high{};
    BITNET_INLINE void Add(Row bytes, const int8_t* x) {
      const __m256i mask = _mm256_set1_epi8(static_cast<char>(3 << 2 * j));
      const __m256i four = Every(x);
      low = Dot(low, _mm256_and_si256(bytes.low, mask), four);
      high = Dot(high, _mm256_and_si256(bytes.high, mask), four);
    }
    Row Shifted() const {
      return {_mm256_srai_epi32(reinterpret_cast<__m256i>(low), 2 * j),
              _mm256_srai_epi32(reinterpret_cast<__m256i>(high), 2 * j)};
    }
  };

  static void OnePanel(const int8_t* x, Panel codes, int64_t byte_rows, int32_t* sums) {
    Masked<0> a;
    Masked<1> b;
    Masked<2> c;
    Masked<3> d;
    for (int64_t start = 0; start < byte_rows; start += kBlockRows) {
      const int64_t rows = Least(byte_rows - start, kBlockRows), field_depth = 4 * rows;
      for (int64_t r = 0; r < rows; ++r, codes.bytes += codes.row, x += 4) {
        Prefetch(codes.bytes);
        const Row bytes = Load(codes.bytes);
        a.Add(bytes, x);
        b.Add(bytes, x + field_depth);
        c.Add(bytes, x + 2 * field_depth);
        d.Add(bytes, x + 3 * field_depth);
      }
      x += 3 * field_depth;
    }
    AddTo(sums, a.Shifted());
    AddTo(sums, b.Shifted());
    AddTo(sums, c.Shifted());
    AddTo(sums, d.Shifted());
  }

  static BITNET_INLINE Int32s Dot(Int32s sums, __m256i codes, __m256i x) {
    return reinterpret_cast<Int32s>(BITNET_DOT(reinterpret_cast<__m256i>(sums), codes, x));
  }
};

bool HasAvxVnni() {
#ifdef BITNET_TEST_AVX_VNNI_AS_AVX512
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return __builtin_cpu_supports("avx2") && CpuHas(7, 1, kEax, 4);
#endif
}

}  // namespace

const Path kAvxVnniPath = PathOf<AvxVnni>("avx_vnni", HasAvxVnni);

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_AVX_VNNI
