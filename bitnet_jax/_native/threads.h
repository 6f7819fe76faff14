// Work shared out over a pool that may be busy, small or gone.

#pragma once

#include <cstdint>
#include <functional>

namespace bitnet {

class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t Threads() const = 0;
  virtual void Schedule(std::function<void()> task) = 0;
};

// How many threads so much work is worth. A unit is about what a thread multiplies, or reads
// from cache, in a nanosecond.
constexpr int64_t kFloatsPerUnit = 4;  // that are quantised
int64_t ThreadsFor(const Pool& pool, int64_t work);

// Calls work(first, last) over all pieces [0, pieces), on up to `threads` threads; returns
// when all are done. Runs are long at first, so that a thread reads on where it is, and end
// in single pieces, so that all end together. The caller works too and waits only for runs
// that somebody has begun, so it ends even where no thread of the pool ever comes.
void ParallelFor(Pool& pool, int64_t pieces, int64_t threads,
                 const std::function<void(int64_t, int64_t)>& work);

}  // namespace bitnet
