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

// Calls work(first, last) over all pieces [0, pieces), in runs of at most `run`, on up to
// Threads() threads; returns when all are done. The caller works too and waits only for
// runs that somebody has begun, so it ends even where no thread of the pool ever comes.
void ParallelFor(Pool& pool, int64_t pieces, int64_t run,
                 const std::function<void(int64_t, int64_t)>& work);

}  // namespace bitnet
