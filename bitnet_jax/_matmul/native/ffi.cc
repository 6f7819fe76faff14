// XLA's door to the product: shapes are checked, work is cut into pieces, and the
// threads of XLA's own pool take them.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define BITNET_EXPORT extern "C" __attribute__((visibility("default")))

namespace bitnet {
namespace {

std::atomic<int> chosen{-1};

const Path& Chosen() {
  int index = chosen.load(std::memory_order_relaxed);
  if (index < 0) {
    index = 0;
    while (!kPaths[index].supported()) ++index;
    chosen.store(index, std::memory_order_relaxed);
  }
  return kPaths[index];
}

// Below so many weights times rows a second thread costs more than it saves.
constexpr int64_t kWorthAThread = int64_t{1} << 20;

// What the threads share. A task that starts late finds no piece left; whoever takes
// the last reference frees it, so nobody waits for a task that has not started.
struct Shared {
  std::function<void(int64_t)> work;
  int64_t pieces = 0;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t done = 0;

  void Run() {
    int64_t mine = 0;
    for (int64_t piece; (piece = next.fetch_add(1)) < pieces; ++mine) work(piece);
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    done += mine;
    if (done == pieces) all_done.notify_all();
  }
};

void ParallelFor(ffi::ThreadPool& pool, int64_t pieces, int64_t threads,
                 std::function<void(int64_t)> work) {
  threads = std::min(threads, pieces);
  if (threads <= 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
    return;
  }
  auto shared = std::make_shared<Shared>();
  shared->work = std::move(work);
  shared->pieces = pieces;
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([shared] { shared->Run(); });
  shared->Run();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == shared->pieces; });
}

// One slice: rows of x padded to whole blocks, with the sum of each.
struct Rows {
  std::vector<int8_t> padded;
  std::vector<int32_t> totals;
  const int8_t* data;
  int64_t stride;

  Rows(const int8_t* x, int64_t rows, int64_t k, int64_t blocks) : data(x), stride(k) {
    totals.resize(rows);
    for (int64_t m = 0; m < rows; ++m) {
      int32_t total = 0;
      for (int64_t i = 0; i < k; ++i) total += x[m * k + i];
      totals[m] = total;
    }
    if (k % kDepth == 0) return;
    stride = blocks * kDepth;
    padded.assign(rows * stride, 0);
    for (int64_t m = 0; m < rows; ++m) std::memcpy(&padded[m * stride], x + m * k, k);
    data = padded.data();
  }
};

// x (B, M, K) int8, codes (B, N / 16, K / 256, 16, 64) uint8 -> sums (B, M, N) int32.
ffi::Error Sums(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::U8> codes,
                ffi::ResultBuffer<ffi::S32> sums) {
  const auto xd = x.dimensions(), cd = codes.dimensions(), yd = sums->dimensions();
  if (xd.size() != 3 || cd.size() != 5 || yd.size() != 3) {
    return ffi::Error::InvalidArgument(
        "bitnet_jax: want x (B, M, K), codes (B, N/16, K/256, 16, 64), sums (B, M, N)");
  }
  const int64_t batch = xd[0], rows = xd[1], k = xd[2], n = yd[2];
  const int64_t blocks = (k + kDepth - 1) / kDepth, panels = (n + kOutputs - 1) / kOutputs;
  if (cd[0] != batch || yd[0] != batch || yd[1] != rows || cd[1] != panels || cd[2] != blocks ||
      cd[3] * cd[4] != kBlockBytes || k > kMostDepth) {
    return ffi::Error::InvalidArgument(
        "bitnet_jax: x, codes and sums do not meet; prepare the kernel again with bj.prepare");
  }
  if (rows == 0 || n == 0) return ffi::Error::Success();

  const Product product = Chosen().product;
  const int64_t quads = (panels + kPanels - 1) / kPanels;
  // Enough rows a piece to use a panel while it is in cache, few enough to share out.
  const int64_t slab = std::min<int64_t>(rows, 64), slabs = (rows + slab - 1) / slab;
  const int64_t threads = batch * rows * k * n < kWorthAThread ? 1 : pool.num_threads();
  std::vector<Rows> slices;
  slices.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    slices.emplace_back(x.typed_data() + b * rows * k, rows, k, blocks);
  }

  auto work = [&](int64_t piece) {
    const int64_t s = piece % slabs, q = piece / slabs % quads, b = piece / slabs / quads;
    const int64_t first_row = s * slab, taken = std::min(slab, rows - first_row);
    const int64_t first = q * kPanels, count = std::min(kPanels, panels - first);
    const Rows& slice = slices[b];
    int32_t raw[64 * kPanels * kOutputs];
    const uint8_t* from = codes.typed_data() + (b * panels + first) * blocks * kBlockBytes;
    product(slice.data + first_row * slice.stride, slice.stride, taken, from, blocks, count, raw);
    const int64_t column = first * kOutputs;
    const int64_t columns = std::min(count * kOutputs, n - column);
    for (int64_t m = 0; m < taken; ++m) {
      int32_t* to = sums->typed_data() + (b * rows + first_row + m) * n + column;
      const int32_t* row = raw + m * kPanels * kOutputs;
      const int32_t total = slice.totals[first_row + m];
      for (int64_t c = 0; c < columns; ++c) to[c] = row[c] - total;
    }
  };
  ParallelFor(pool, batch * quads * slabs, threads, work);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

XLA_FFI_DEFINE_HANDLER(BitnetSumsHandler, bitnet::Sums,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::Buffer<ffi::S8>>()
                           .Arg<ffi::Buffer<ffi::U8>>()
                           .Ret<ffi::Buffer<ffi::S32>>());

BITNET_EXPORT XLA_FFI_Error* bitnet_sums(XLA_FFI_CallFrame* frame) {
  return BitnetSumsHandler(frame);
}

// The version of XLA's FFI that this was compiled for: 1000 * major + minor.
BITNET_EXPORT int bitnet_ffi_version() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }

// The name of a path, or null after the last; whether this processor runs it.
BITNET_EXPORT const char* bitnet_path(int index) {
  return index >= 0 && index < bitnet::kPathCount ? bitnet::kPaths[index].name : nullptr;
}

BITNET_EXPORT int bitnet_path_supported(int index) {
  return index >= 0 && index < bitnet::kPathCount && bitnet::kPaths[index].supported();
}

// Takes another path than the fastest, for tests. Nonzero: this processor cannot.
BITNET_EXPORT int bitnet_choose_path(const char* name) {
  for (int i = 0; i < bitnet::kPathCount; ++i) {
    if (std::strcmp(bitnet::kPaths[i].name, name) == 0 && bitnet::kPaths[i].supported()) {
      bitnet::chosen.store(i);
      return 0;
    }
  }
  return 1;
}
