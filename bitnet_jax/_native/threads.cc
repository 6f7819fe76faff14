#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

namespace bitnet {
namespace {

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // most processors take yield for nothing
#endif
}

// What the threads share. A task that starts late finds no piece left and does not touch
// `work`, which is gone by then; whoever takes the last reference frees the rest.
struct Shared {
  const std::function<void(int64_t, int64_t)>* work;
  int64_t pieces, threads;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable all_done;

  // What a piece throws (no memory) ends the process: others still use what it unwinds.
  void Run() noexcept {
    int64_t mine = 0;
    for (int64_t first = next.load(); first < pieces;) {
      const int64_t last = first + std::max<int64_t>(1, (pieces - first) / (2 * threads));
      if (!next.compare_exchange_weak(first, last)) continue;
      (*work)(first, last);
      mine += last - first;
      first = next.load();
    }
    if (mine > 0 && done.fetch_add(mine) + mine == pieces) {
      std::lock_guard<std::mutex> lock(mutex);
      all_done.notify_all();
    }
  }

  bool Done() const { return done.load() == pieces; }

  void Wait() {
    // The others are in their last run: sleeping would cost more than most of them take.
    for (int spin = 0; spin < 4096; ++spin) {
      if (Done()) return;
      Pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return Done(); });
  }
};

}  // namespace

int64_t ThreadsFor(const Pool& pool, int64_t work) {
  // A second thread costs a few microseconds: below so much work it is not worth it.
  constexpr int64_t kWorthAThread = 12000;
  return work < kWorthAThread ? 1 : pool.Threads();
}

void ParallelFor(Pool& pool, int64_t pieces, int64_t threads,
                 const std::function<void(int64_t, int64_t)>& work) {
  if (pieces <= 0) return;
  threads = std::min({threads, pool.Threads(), pieces});
  if (threads <= 1) return work(0, pieces);
  auto shared = std::make_shared<Shared>();
  shared->work = &work;
  shared->pieces = pieces;
  shared->threads = threads;
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([shared] { shared->Run(); });
  shared->Run();
  shared->Wait();
}

}  // namespace bitnet
