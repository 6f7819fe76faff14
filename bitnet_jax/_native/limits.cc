// The two limits that a product is measured against: how fast this machine reads, and how
// fast the chosen path multiplies what is in registers already.

#include <atomic>
#include <cstring>

#include "product.h"

namespace bitnet {
namespace {

constexpr int64_t kLine = 64;

inline uint64_t Word(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

// Whole lines from `streams` places side by side, so many bytes of each.
uint64_t ReadStreams(const uint8_t* from, int64_t bytes, int64_t streams) {
  constexpr int64_t kAhead = 4096;
  uint64_t total[8] = {};
  for (int64_t at = 0; at + kLine <= bytes; at += kLine) {
    for (int64_t s = 0; s < streams; ++s) {
      const uint8_t* line = from + s * bytes + at;
      if (streams > 1) __builtin_prefetch(line + kAhead);
      for (int64_t i = 0; i < 8; ++i) total[i] += Word(line + 8 * i);
    }
  }
  uint64_t sum = 0;
  for (const uint64_t t : total) sum += t;
  return sum;
}

}  // namespace

uint64_t Read(Pool& pool, const uint8_t* from, int64_t bytes, int64_t streams) {
  const int64_t pieces = 8 * pool.Threads(), piece = bytes / pieces;
  const int64_t each = piece / streams / kLine * kLine;
  std::atomic<uint64_t> total{0};
  ParallelFor(pool, pieces, pool.Threads(), [&](int64_t first, int64_t last) {
    for (; first < last; ++first) total += ReadStreams(from + first * piece, each, streams);
  });
  return total;
}

int64_t Busy(Pool& pool, int64_t turns) {
  std::atomic<int64_t> operations{0};
  ParallelFor(pool, pool.Threads(), pool.Threads(), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      int32_t sink = 0;
      operations += Chosen().busy(turns, &sink);
      asm volatile("" : : "r"(sink));
    }
  });
  return operations;
}

}  // namespace bitnet
