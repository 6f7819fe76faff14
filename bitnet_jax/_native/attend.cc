#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "product.h"
#include "target.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than a register are passed inside only
#endif

namespace bitnet {
namespace {

// A few tokens are cut along the slots too, for there may be fewer key heads than threads, and
// by so many whatever their number: it decides no bit.
constexpr int64_t kChunk = 64;

// Slots [first, last).
struct Slots {
  int64_t first, last;
};

// What a group of heads gathers from some slots: y (group, dim), weighted relative to the
// largest score, and what the weights sum to.
struct Partial {
  float* y;
  float* largest;
  float* sums;
};

}  // namespace

#ifdef BITNET_X86
BITNET_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512_attend {
constexpr int kKeysTogether = 4;  // keys that four queries meet at a time, sums in registers
#include "attend_lanes.h"
#include "attend_kernels.h"
}
BITNET_TARGET_END
BITNET_TARGET("avx2,fma")
namespace avx2_attend {
constexpr int kKeysTogether = 1;
#include "attend_lanes.h"
#include "attend_kernels.h"
}
BITNET_TARGET_END
#endif
namespace plain_attend {
constexpr int kKeysTogether = 1;
#ifdef BITNET_ARM
#include "attend_neon.h"
#else
#include "attend_lanes.h"
#endif
#include "attend_kernels.h"
}

namespace {

template <class Key>
auto Best() {
#ifdef BITNET_X86
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return avx512_attend::Part<Key>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2_attend::Part<Key>;
  }
#endif
  return plain_attend::Part<Key>;
}

constexpr int64_t kFewTokens = 4;

// The slots that a token sees lie in these.
template <class Key>
Slots Seen(const Attention<Key>& a, int64_t token) {
  const uint8_t* mask = a.mask + token * a.slots;
  Slots seen{0, a.slots};
  while (seen.first < seen.last && !mask[seen.first]) ++seen.first;
  while (seen.last > seen.first && !mask[seen.last - 1]) --seen.last;
  return seen;
}

// The parts of a head as one: y (dim,).
void Merge(const float* parts, const float* largest, const float* sums, int64_t count,
           int64_t stride, int64_t dim, float* y) {
  float most = largest[0], total = 0;
  for (int64_t c = 1; c < count; ++c) most = std::max(most, largest[c * stride]);
  std::fill(y, y + dim, 0.0f);
  for (int64_t c = 0; c < count; ++c) {
    if (sums[c * stride] == 0) continue;  // no slot of it is seen
    const float weight = count == 1 ? 1.0f : std::exp(largest[c * stride] - most);
    total += weight * sums[c * stride];
    for (int64_t d = 0; d < dim; ++d) y[d] += weight * parts[c * stride * dim + d];
  }
  if (total == 0) return;
  for (int64_t d = 0; d < dim; ++d) y[d] /= total;
}

}  // namespace

template <class Key>
void Attend(Pool& pool, const Attention<Key>& a) {
  static const auto part = Best<Key>();
  const int64_t group = a.heads / a.kv_heads, tokens = a.batch * a.length;
  const int64_t chunks = a.length > kFewTokens ? 1 : CeilDiv(a.slots, kChunk);
  // (token, chunk, head): a thread takes tokens one after the other, which read the same keys.
  const int64_t rows = tokens * chunks * a.heads, pieces = tokens * chunks * a.kv_heads;
  std::vector<Slots> seen(tokens);
  ParallelFor(pool, tokens, chunks > 1 ? 1 : pool.Threads(), [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) seen[token] = Seen(a, token);
  });
  std::unique_ptr<float[]> all(new float[rows * (a.dim + 2)]);
  float *y = all.get(), *largest = y + rows * a.dim, *sums = largest + rows;
  ParallelFor(pool, pieces, pool.Threads(), [&](int64_t first, int64_t last) {
    thread_local std::vector<float> scores;
    scores.resize(4 * a.slots + 16);
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t l = piece % a.length, rest = piece / a.length;
      const int64_t kv = rest % a.kv_heads, c = rest / a.kv_heads % chunks;
      const int64_t b = rest / a.kv_heads / chunks, token = b * a.length + l;
      Slots slots = seen[token];
      if (chunks > 1) {
        slots.first = std::min(slots.last, slots.first + c * kChunk);
        slots.last = std::min(slots.last, slots.first + kChunk);
      }
      const int64_t row = (token * chunks + c) * a.heads + kv * group;
      part(a, b, l, kv, slots, scores.data(), {y + row * a.dim, largest + row, sums + row});
    }
  });
  for (int64_t head = 0; head < tokens * a.heads; ++head) {
    const int64_t row = head / a.heads * chunks * a.heads + head % a.heads;
    Merge(y + row * a.dim, largest + row, sums + row, chunks, a.heads, a.dim, a.y + head * a.dim);
  }
}

template void Attend(Pool& pool, const Attention<float>& attention);
template void Attend(Pool& pool, const Attention<BFloat16>& attention);

}  // namespace bitnet
