#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "product.h"
#include "target.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than a register are passed inside only
#endif

namespace bitnet {

#ifdef BITNET_X86
BITNET_TARGET("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512_attend {
#include "attend_kernels.h"
}
BITNET_TARGET_END
BITNET_TARGET("avx2")
namespace avx2_attend {
#include "attend_kernels.h"
}
BITNET_TARGET_END
#endif
namespace plain_attend {
#include "attend_kernels.h"
}

namespace {

template <class Key>
auto Best() {
#ifdef BITNET_X86
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512_attend::One<Key>;
  }
  if (__builtin_cpu_supports("avx2")) return avx2_attend::One<Key>;
#endif
  return plain_attend::One<Key>;
}

}  // namespace

template <class Key>
void Attend(Pool& pool, const Attention<Key>& a) {
  static const auto one = Best<Key>();
  // A thread takes tokens one after the other: they read the same keys.
  const int64_t pieces = a.batch * a.kv_heads * a.length;
  const int64_t run = std::min(a.length, CeilDiv(pieces, 8 * pool.Threads()));
  ParallelFor(pool, pieces, run, [&](int64_t first, int64_t last) {
    thread_local std::vector<float> scores;
    scores.resize(4 * a.slots + 16);
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t head = piece / a.length;
      one(a, head / a.kv_heads, piece % a.length, head % a.kv_heads, scores.data());
    }
  });
}

template void Attend(Pool& pool, const Attention<float>& attention);
template void Attend(Pool& pool, const Attention<BFloat16>& attention);

}  // namespace bitnet
