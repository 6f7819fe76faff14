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
  static constexpr int kTileRows = 6, kTilePanels = 1;
  static constexpr int64_t kDirectRows = 6;
  static constexpr int64_t kStepRows = 4 * kBlockRows;
  static constexpr uint32_t kBias[2] = {1, 128};

  template <Kind>
  struct Total : Sums<Int32s> {
    void Add(Row codes, Activations x) {
      low = Of(BITNET_DOT(Raw(low), codes.low, x));
      high = Of(BITNET_DOT(Raw(high), codes.high, x));
    }
    void AddTo(int32_t* to) const { Ymm::AddTo(to, {Raw(low), Raw(high)}); }
  };

  static void OneRow(const Rows& x, Panel codes, int64_t byte_rows, int32_t* sums) {
    OneRowDirect<AvxVnni>(x, codes, byte_rows, sums);
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
