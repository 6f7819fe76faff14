// The native product without XLA: every path on buffers of exactly the bytes that it may
// touch, against sums written from the layout's definition; whole operations on a pool of
// threads; pools that are slow or never come. Built with sanitizers by .ci/slow, and with
// tiles by hand (-DBITNET_TEST_AMX_BY_HAND) and for Arm by tests/matmul/test_native_faults.py.

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "attend.h"
#include "product.h"
#include "quantize.h"
#include "sha256.h"

namespace {

using namespace bitnet;

std::mt19937 generator(0);

int Random(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// Memory of exactly `size` elements, so that a sanitizer sees one byte too many.
template <class T>
std::unique_ptr<T[]> Exactly(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]());
}

class NoThreads : public Pool {
 public:
  int64_t Threads() const override { return 1; }
  void Schedule(std::function<void()>) override {}
};

// A pool whose threads never come: the caller has to do it all.
class Gone : public Pool {
 public:
  int64_t Threads() const override { return 8; }
  void Schedule(std::function<void()>) override {}
};

class Workers : public Pool {
 public:
  explicit Workers(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Workers() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    ready_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int64_t Threads() const override { return static_cast<int64_t>(threads_.size()); }
  void Schedule(std::function<void()> task) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }

 private:
  void Work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }
  std::vector<std::thread> threads_;
  std::deque<std::function<void()>> tasks_;
  std::mutex mutex_;
  std::condition_variable ready_;
  bool stop_ = false;
};

struct Activations;

// A kernel in both layouts and as plain codes (groups * depth, outputs).
struct Kernel {
  Kind kind;
  int64_t groups, depth, outputs;
  std::vector<int> codes;
  std::unique_ptr<uint8_t[]> stored, table, panels;  // table: int8, transposed
  std::unique_ptr<int8_t[]> each;                    // codes of eight bits
  int64_t panel_bytes;

  // `largest`: all codes are as large as they can be, so that narrow sums would overflow.
  Kernel(Pool& pool, Kind kind, int64_t groups, int64_t depth, int64_t outputs,
         bool largest = false)
      : kind(kind), groups(groups), depth(depth), outputs(outputs) {
    const int64_t length = groups * depth, most = kind == Kind::kTernary ? 1 : 127;
    codes.resize(length * outputs);
    for (auto& code : codes) code = largest ? most : Random(-most, most);
    const int64_t rows = kind == Kind::kTernary ? CeilDiv(length, 4) : length;
    stored = Exactly<uint8_t>(rows * outputs);
    if (kind == Kind::kTernary) std::fill_n(stored.get(), rows * outputs, 0x55);
    for (int64_t k = 0; k < length; ++k) {
      for (int64_t n = 0; n < outputs; ++n) {
        const int code = codes[k * outputs + n];
        if (kind == Kind::kInt8) {
          stored[k * outputs + n] = static_cast<uint8_t>(code);
        } else {
          uint8_t& byte = stored[k / 4 * outputs + n];
          const int shift = static_cast<int>(2 * (k % 4));
          byte = static_cast<uint8_t>((byte & ~(3 << shift)) | ((code + 1) << shift));
        }
      }
    }
    panel_bytes = ByteRows(kind, depth) * kRowBytes;
    panels = Exactly<uint8_t>(groups * Panels(outputs) * panel_bytes);
    each = Exactly<int8_t>(length * outputs);
    std::copy(codes.begin(), codes.end(), each.get());
    LayOut(pool, {kind, stored.get(), 1, rows, outputs, length, groups, depth, false},
           panels.get());
    if (kind == Kind::kTernary) return;
    table = Exactly<uint8_t>(rows * outputs);
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t n = 0; n < outputs; ++n) table[n * rows + k] = stored[k * outputs + n];
    }
  }

  // Panels of an int8 kernel that is stored as its transpose.
  int64_t WrongFromTransposed(Pool& pool) const {
    const int64_t bytes = groups * Panels(outputs) * panel_bytes;
    auto again = Exactly<uint8_t>(bytes);
    LayOut(pool, {kind, table.get(), 1, depth, outputs, depth, 1, depth, true}, again.get());
    return std::memcmp(again.get(), panels.get(), bytes) != 0;
  }

  // What a product reads it from: 0 panels, and an int8 kernel 1 as it is stored, 2 transposed.
  int64_t Forms() const { return kind == Kind::kInt8 ? 3 : 2; }

  Product Times(const Activations& x, int64_t form) const;

  // From the panels, as layout.h defines them.
  int Laid(int64_t g, int64_t k, int64_t n) const {
    const int64_t count = Panels(outputs), four = n / 64 * 4;
    const int64_t row = 64 * std::min<int64_t>(4, count - four);
    const uint8_t* panel = panels.get() + (g * count + four) * panel_bytes + 64 * (n / 16 - four);
    if (kind == Kind::kInt8) return panel[k / 4 * row + 4 * (n % 16) + k % 4] - 128;
    const int64_t rows = std::min<int64_t>(16, ByteRows(kind, depth) - k / 256 * 16);
    const int64_t in = k % 256, j = in / (4 * rows), r = in % (4 * rows) / 4;
    const uint8_t byte = panel[(k / 256 * 16 + r) * row + 4 * (n % 16) + in % 4];
    return ((byte >> (2 * j)) & 3) - 1;
  }

  int64_t WrongLayout() const {
    int64_t wrong = 0;
    for (int64_t k = 0; k < groups * depth; ++k) {
      for (int64_t n = 0; n < outputs; ++n) {
        wrong += Laid(k / depth, k % depth, n) != codes[k * outputs + n];
      }
    }
    return wrong;
  }
};

// Codes and gammas, for sums of `parts` of each group of the kernel.
struct Activations {
  int64_t rows, length, parts, gammas, stride;
  std::unique_ptr<int8_t[]> codes;
  std::unique_ptr<float[]> gamma;

  Activations(int64_t rows, const Kernel& kernel, bool extreme, int64_t parts = 1)
      : rows(rows), length(kernel.groups * kernel.depth), parts(parts) {
    const int64_t part = kernel.depth / parts;
    gammas = parts > 1 ? kernel.groups * parts : 1;
    stride = length - part + CeilDiv(part, kPadding) * kPadding;
    codes = Exactly<int8_t>(rows * stride);
    gamma = Exactly<float>(rows * gammas);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t g = 0; g < gammas; ++g) {
        gamma[m * gammas + g] = 0.5f + static_cast<float>((m + 3 * g) % 7);
      }
      for (int64_t k = 0; k < length; ++k) {
        codes[m * stride + k] =
            static_cast<int8_t>(extreme ? (m % 2 ? -127 : 127) : Random(-127, 127));
      }
    }
  }
};

Product Kernel::Times(const Activations& x, int64_t form) const {
  const int8_t* as_stored = form == 2 ? reinterpret_cast<const int8_t*>(table.get()) : each.get();
  return {kind,
          1,
          x.rows,
          outputs,
          groups,
          depth,
          x.parts,
          x.codes.get(),
          x.stride,
          form == 0 ? panels.get() : nullptr,
          form == 0 ? nullptr : as_stored,
          form == 2};
}

int64_t WrongSumsFrom(Pool& pool, const Kernel& kernel, const Activations& x, int64_t form) {
  const int64_t count = kernel.groups * x.parts, depth = kernel.depth / x.parts;
  auto sums = Exactly<int32_t>(count * x.rows * kernel.outputs);
  auto y = Exactly<float>(x.rows * kernel.outputs);
  auto scale = Exactly<float>(kernel.groups);
  for (int64_t g = 0; g < kernel.groups; ++g) scale[g] = 0.25f * static_cast<float>(g + 1);
  const Product product = kernel.Times(x, form);
  MultiplyToSums(pool, product, sums.get());
  Multiply(pool, product, {x.gamma.get(), x.gammas, scale.get(), 1, 127.0f}, y.get());
  int64_t wrong = 0;
  for (int64_t m = 0; m < x.rows; ++m) {
    for (int64_t n = 0; n < kernel.outputs; ++n) {
      float total = 0.0f;
      for (int64_t s = 0; s < count; ++s) {
        int64_t want = 0;
        for (int64_t k = s * depth; k < (s + 1) * depth; ++k) {
          want += kernel.codes[k * kernel.outputs + n] * x.codes[m * x.stride + k];
        }
        wrong += sums[(s * x.rows + m) * kernel.outputs + n] != want;
        const float gamma = x.gamma[m * x.gammas + (x.gammas > 1 ? s : 0)];
        const float scaled = static_cast<float>(want) * gamma;
        const float step = scale[s / x.parts] * static_cast<float>(1.0 / 127);
        total += scaled * step;
      }
      wrong += y[m * kernel.outputs + n] != total;
    }
  }
  return wrong;
}

int64_t WrongSums(Pool& pool, const Kernel& kernel, const Activations& x) {
  int64_t wrong = 0;
  for (int64_t form = 0; form < kernel.Forms(); ++form) {
    wrong += WrongSumsFrom(pool, kernel, x, form);
  }
  return wrong;
}

// The nearest bfloat16, of two at the same distance the even one.
BFloat16 Nearest(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const auto distance = [&](uint32_t high) {
    const uint32_t whole = high << 16;
    float candidate;
    std::memcpy(&candidate, &whole, sizeof(candidate));
    return std::abs(static_cast<double>(candidate) - value);
  };
  const uint32_t down = bits >> 16;  // nearer to 0
  const double to_down = distance(down), to_up = distance(down + 1);
  const bool up = to_up < to_down || (to_up == to_down && down % 2 == 1);
  return {static_cast<uint16_t>(down + up)};
}

float Wide(float x) { return x; }

float Wide(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void Narrow(float x, float* to) { *to = x; }
void Narrow(float x, BFloat16* to) { *to = Nearest(x); }

// bfloat16 outputs that are not the rounded float32 ones, and rows of an infinite gamma that
// are not NaN from end to end.
int64_t WrongOutputs(Pool& pool, const Kernel& kernel, Activations x) {
  const int64_t size = x.rows * kernel.outputs;
  auto wide = Exactly<float>(size);
  auto narrow = Exactly<BFloat16>(size);
  auto scale = Exactly<float>(kernel.outputs * kernel.groups);
  for (int64_t n = 0; n < kernel.outputs * kernel.groups; ++n) scale[n] = 0.37f + 0.01f * (n % 9);
  const Product product = kernel.Times(x, 0);
  x.gamma[x.rows - 1] = std::numeric_limits<float>::infinity();
  const Scales scales{x.gamma.get(), 1, scale.get(), kernel.outputs, 127.0f};
  Multiply(pool, product, scales, wide.get());
  Multiply(pool, product, scales, narrow.get());
  int64_t wrong = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (i / kernel.outputs == x.rows - 1) {
      wrong += !std::isnan(wide[i]) || !std::isnan(Wide(narrow[i]));
    } else {
      wrong += narrow[i].bits != Nearest(wide[i]).bits;
    }
  }
  return wrong;
}

// Halves of steps, which are rounded to even: where a product and a sum are fused, the rounding
// between them is left out and others come out.
template <class Float>
int64_t WrongCodesOf(Pool& pool, int64_t length, int64_t groups) {
  const int64_t rows = 6, stride = CeilDiv(length, kPadding) * kPadding, depth = length / groups;
  auto x = Exactly<Float>(rows * length);
  auto codes = Exactly<int8_t>(rows * stride);
  auto gamma = Exactly<float>(rows * groups);
  for (int64_t i = 0; i < rows * length; ++i) {
    const bool halves = i / length % 2 == 1;
    const float largest = 0.1f * static_cast<float>(1 + i / depth % 13);
    const float half = (static_cast<float>(Random(-126, 125)) + 0.5f) * (largest / 127);
    Narrow(!halves          ? static_cast<float>(Random(-999, 999)) / 64
           : i % depth == 0 ? largest
                            : half,
           &x[i]);
  }
  Narrow(std::numeric_limits<float>::quiet_NaN(), &x[4 * length + length / 2]);
  Narrow(-std::numeric_limits<float>::infinity(), &x[5 * length + length / 3]);
  QuantizeRows(pool, x.get(), rows, length, {1, 1.0f}, groups, stride, 127.0f, 1e-5f, codes.get(),
               gamma.get());
  int64_t wrong = 0;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t g = 0; g < groups; ++g) {
      const Float* from = x.get() + m * length + g * depth;
      const int8_t* to = codes.get() + m * stride + g * depth;
      float largest = 1e-5f;
      bool finite = true;
      for (int64_t k = 0; k < depth; ++k) {
        largest = std::max(largest, std::abs(Wide(from[k])));
        finite = finite && std::isfinite(Wide(from[k]));
      }
      if (!finite) largest = std::numeric_limits<float>::infinity();
      wrong += gamma[m * groups + g] != largest;
      const float step = finite ? 127.0f / largest : 0.0f;
      for (int64_t k = 0; k < depth; ++k) {
        const volatile float scaled = finite ? Wide(from[k]) * step : 0.0f;
        wrong += to[k] != std::nearbyint(scaled);
      }
    }
    for (int64_t k = length; k < stride; ++k) wrong += codes[m * stride + k] != 0;
  }
  return wrong;
}

int64_t WrongCodes(Pool& pool) {
  int64_t wrong = 0;
  for (int64_t length : {1, 3, 16, 63, 64, 65, 1000}) {
    wrong += WrongCodesOf<float>(pool, length, 1) + WrongCodesOf<BFloat16>(pool, length, 1);
  }
  for (int64_t groups : {2, 5, 8, 125, 1000}) {
    wrong += WrongCodesOf<float>(pool, 1000, groups) + WrongCodesOf<BFloat16>(pool, 1000, groups);
  }
  return wrong;
}

// A halving tree over adjacent pairs, zeros behind the last.
float PairSum(std::vector<float> values) {
  while (values.size() > 1) {
    if (values.size() % 2) values.push_back(0.0f);
    for (size_t i = 0; i < values.size() / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    values.resize(values.size() / 2);
  }
  return values[0];
}

// Codes and scales of a kernel that are not those of the tree, one output at a time.
template <class Float>
int64_t WrongQuantizedOf(Pool& pool, int64_t slices, int64_t rows, int64_t outputs, bool across,
                         bool survivors) {
  const int64_t size = rows * outputs;
  const float threshold = survivors ? 0.7f : 0.5f, eps = 1e-5f;
  auto w = Exactly<Float>(slices * size);
  auto codes = Exactly<int8_t>(slices * size);
  auto scale = Exactly<float>(slices * (across ? 1 : outputs));
  for (int64_t i = 0; i < slices * size; ++i) Narrow(Random(-999, 999) / 77.0f, &w[i]);
  const Ternarized kernel{slices, rows, outputs, across, survivors, threshold, eps};
  QuantizeKernel(pool, kernel, w.get(), codes.get(), scale.get());
  int64_t wrong = 0;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const auto at = [&](int64_t row, int64_t n) { return slice * size + row * outputs + n; };
    // The mean of |w| over some columns; where `kept` is not null, of the weights it marks.
    const auto mean = [&](int64_t first, int64_t last, const int8_t* kept) {
      std::vector<float> sums;
      int64_t count = 0;
      for (int64_t n = first; n < last; ++n) {
        std::vector<float> column;
        for (int64_t k = 0; k < rows; ++k) {
          const bool in = kept == nullptr || kept[at(k, n)] != 0;
          column.push_back(in ? std::abs(Wide(w[at(k, n)])) * 0x1p-32f : 0.0f);
          count += in;
        }
        sums.push_back(PairSum(column));
      }
      const float sum = PairSum(sums);
      return std::max(
          eps,
          0x1p32f * (kept == nullptr ? sum * static_cast<float>(1.0 / static_cast<double>(count))
                                     : sum / static_cast<float>(std::max<int64_t>(count, 1))));
    };
    float inverse = 0.0f;
    for (int64_t n = 0; n < outputs; ++n) {
      const int64_t first = across ? 0 : n, last = across ? outputs : n + 1;
      if (n == first) inverse = 1.0f / mean(first, last, nullptr);
      for (int64_t k = 0; k < rows; ++k) {
        const float r = Wide(w[at(k, n)]) * inverse;
        wrong += codes[at(k, n)] != (std::abs(r) <= threshold ? 0 : r < 0 ? -1 : 1);
      }
      if (across && n > 0) continue;
      wrong += scale[slice * (across ? 1 : outputs) + n] !=
               mean(first, last, survivors ? codes.get() : nullptr);
    }
  }
  return wrong;
}

int64_t WrongQuantized(Pool& pool) {
  int64_t wrong = 0;
  for (int64_t rows : {1, 5, 16, 17, 33, 256, 300}) {
    for (int64_t outputs : {1, 7, 128, 131}) {
      for (const bool across : {false, true}) {
        for (const bool survivors : {false, true}) {
          wrong += WrongQuantizedOf<float>(pool, 2, rows, outputs, across, survivors);
          wrong += WrongQuantizedOf<BFloat16>(pool, 2, rows, outputs, across, survivors);
        }
      }
    }
  }
  return wrong + WrongQuantizedOf<float>(pool, 1, 4100, 3, true, true);
}

int64_t CheckPath(Pool& pool, const Path& path) {
  int64_t wrong = WrongCodes(pool) + WrongQuantized(pool) + (Busy(pool, 3) < 3);
  for (const Kind kind : {Kind::kTernary, Kind::kInt8}) {
    for (int64_t depth : {1, 4, 15, 33, 64, 96, 250, 256, 260, 1024, 1300, 2100}) {
      for (int64_t outputs : {1, 16, 63, 64, 130}) {
        const int64_t groups = kind == Kind::kTernary && depth < 100 && depth % 4 == 0 ? 3 : 1;
        const Kernel kernel(pool, kind, groups, depth, outputs);
        wrong += kernel.WrongLayout();
        if (kind == Kind::kInt8) wrong += kernel.WrongFromTransposed(pool);
        for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 33, 40, 50}) {
          wrong += WrongSums(pool, kernel, Activations(rows, kernel, depth % 2 == 0));
        }
        wrong += WrongOutputs(pool, kernel, Activations(9, kernel, false));
        for (int64_t parts : {2, 3, 4, 5, 8, 16}) {
          if (depth % (4 * parts) != 0) continue;
          for (int64_t rows : {1, 7, 33}) {
            wrong += WrongSums(pool, kernel, Activations(rows, kernel, false, parts));
          }
        }
      }
    }
  }
  for (const Kind kind : {Kind::kTernary, Kind::kInt8}) {
    const Kernel kernel(pool, kind, 1, 2100, 70, true);
    for (int64_t rows : {1, 2, 3, 4, 6, 8, 21}) {
      wrong += WrongSums(pool, kernel, Activations(rows, kernel, true));
    }
  }
  // Other constants than those that the path begins with, where it takes them.
  int64_t before[kConstants];
  const int64_t small[kConstants] = {1, 3, kBlockRows};
  for (int c = 0; c < kConstants; ++c) {
    before[c] = ConstantOf(path, c).load();
    wrong += Tune(path, c, small[c]) != (before[c] != 0) || Tune(path, c, 0);
  }
  wrong += Tune(path, 2, kBlockRows + 1) || Tune(path, 2, path.most_step_rows + kBlockRows);
  for (const Kind kind : {Kind::kTernary, Kind::kInt8}) {
    const Kernel kernel(pool, kind, 1, 1300, 70);
    for (int64_t rows : {1, 4, 50}) {
      wrong += WrongSums(pool, kernel, Activations(rows, kernel, false));
    }
  }
  for (int c = 0; c < kConstants; ++c) ConstantOf(path, c).store(before[c]);
  // Several slabs, and a last one of another size.
  for (const Kind kind : {Kind::kTernary, Kind::kInt8}) {
    const Kernel kernel(pool, kind, 1, 300, 70);
    wrong += WrongSums(pool, kernel, Activations(1100, kernel, false));
  }
  return wrong;
}

// Outputs of attention that are far from the equation, some slots hidden.
template <class Key>
int64_t WrongAttention(Pool& pool, int64_t length, int64_t slots, int64_t dim) {
  const int64_t batch = 2, kv_heads = 2, heads = 6, group = heads / kv_heads;
  const int64_t queries = batch * length * heads * dim, keys = batch * slots * kv_heads * dim;
  auto q = Exactly<float>(queries), y = Exactly<float>(queries);
  auto k = Exactly<Key>(keys), v = Exactly<Key>(keys);
  auto mask = Exactly<uint8_t>(batch * length * slots);
  for (int64_t i = 0; i < queries; ++i) q[i] = Random(-99, 99) / 50.0f;
  for (int64_t i = 0; i < keys; ++i) Narrow(Random(-99, 99) / 50.0f, &k[i]);
  for (int64_t i = 0; i < keys; ++i) Narrow(Random(-99, 99) / 50.0f, &v[i]);
  for (int64_t i = 0; i < batch * length * slots; ++i) {
    mask[i] = i % slots == slots / 2 || Random(0, 1);
  }
  Attend(pool, Attention<Key>{q.get(), k.get(), v.get(), mask.get(), batch, length, heads, slots,
                              kv_heads, dim, y.get()});
  int64_t wrong = 0;
  for (int64_t token = 0; token < batch * length; ++token) {
    for (int64_t h = 0; h < heads; ++h) {
      const auto at = [&](int64_t t) {
        return ((token / length * slots + t) * kv_heads + h / group) * dim;
      };
      std::vector<double> sums(dim);
      double total = 0;
      for (int64_t t = 0; t < slots; ++t) {
        if (!mask[token * slots + t]) continue;
        double score = 0;
        for (int64_t d = 0; d < dim; ++d) {
          score += q[(token * heads + h) * dim + d] * Wide(k[at(t) + d]);
        }
        const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
        total += weight;
        for (int64_t d = 0; d < dim; ++d) sums[d] += weight * Wide(v[at(t) + d]);
      }
      for (int64_t d = 0; d < dim; ++d) {
        wrong += !(std::abs(y[(token * heads + h) * dim + d] - sums[d] / total) < 1e-4);
      }
    }
  }
  return wrong;
}

// One message, as FIPS 180-4 writes it down.
void PlainSha256(const std::vector<uint8_t>& message, uint8_t* digest) {
  std::vector<uint8_t> padded = message;
  padded.push_back(0x80);
  while (padded.size() % 64 != 56) padded.push_back(0);
  const uint64_t bits = 8 * message.size();
  for (int i = 7; i >= 0; --i) padded.push_back(static_cast<uint8_t>(bits >> 8 * i));
  uint32_t state[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                       0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
  const auto turned = [](uint32_t x, int n) { return x >> n | x << (32 - n); };
  for (size_t block = 0; block < padded.size(); block += 64) {
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; ++i) {
      const uint8_t* at = &padded[block + 4 * i];
      w[i] = uint32_t{at[0]} << 24 | at[1] << 16 | at[2] << 8 | at[3];
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + w[i - 7] + (turned(a, 7) ^ turned(a, 18) ^ a >> 3) +
             (turned(b, 17) ^ turned(b, 19) ^ b >> 10);
    }
    std::copy_n(state, 8, s);
    for (int i = 0; i < 64; ++i) {
      const uint32_t a = s[0], e = s[4];
      const uint32_t first = s[7] + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) +
                             ((e & s[5]) ^ (~e & s[6])) + kHashConstants[i] + w[i];
      const uint32_t second = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) +
                              ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
      std::copy_backward(s, s + 7, s + 8);
      s[4] += first;
      s[0] = first + second;
    }
    for (int i = 0; i < 8; ++i) state[i] += s[i];
  }
  for (int i = 0; i < 32; ++i) digest[i] = static_cast<uint8_t>(state[i / 4] >> 8 * (3 - i % 4));
}

// Digests, and the threes, of messages whose bytes are exactly theirs.
int64_t WrongDigests(const Hasher& hasher) {
  int64_t wrong = 0;
  for (int turn = 0; turn < 40; ++turn) {
    const int count = Random(0, 3 * kMostStreams), longest = turn % 2 == 0 ? 200 : 3000;
    std::vector<std::unique_ptr<uint8_t[]>> bytes;
    std::vector<Message> messages;
    for (int m = 0; m < count; ++m) {
      const int64_t length = turn % 4 == 0 ? 64 * Random(0, 3) : Random(0, longest);
      bytes.push_back(Exactly<uint8_t>(length));
      for (int64_t i = 0; i < length; ++i) bytes[m][i] = Random(0, 255) & 0xAA;
      if (length > 0 && Random(0, 1) == 1) bytes[m][Random(0, length - 1)] |= 3 << 2 * Random(0, 3);
      messages.push_back({bytes[m].get(), length});
    }
    auto digests = Exactly<uint8_t>(count * kDigestBytes);
    auto threes = Exactly<uint8_t>(count);
    Sha256(hasher, messages.data(), count, digests.get(), threes.get());
    for (int m = 0; m < count; ++m) {
      const std::vector<uint8_t> message(messages[m].bytes, messages[m].bytes + messages[m].length);
      uint8_t wanted[kDigestBytes];
      PlainSha256(message, wanted);
      wrong += !std::equal(wanted, wanted + kDigestBytes, &digests[m * kDigestBytes]);
      bool three = false;
      for (const uint8_t byte : message) {
        for (int shift = 0; shift < 8; shift += 2) three |= (byte >> shift & 3) == 3;
      }
      wrong += three != (threes[m] != 0);
    }
  }
  return wrong;
}

}  // namespace

int main() {
  NoThreads alone;
  const Path* const* fastest = kPaths;
  while (!(*fastest)->supported()) ++fastest;
  int64_t failures = &Chosen() != *fastest;
  for (int p = 0; p < kPathCount; ++p) {
    const Path& path = *kPaths[p];
    if (!path.supported()) {
      std::printf("%s: not here\n", path.name);
      continue;
    }
    Choose(path);
    const int64_t wrong = CheckPath(alone, path);
    std::printf("%s: %lld wrong\n", path.name, static_cast<long long>(wrong));
    failures += wrong;
  }
  // Eight callers on one pool, and a pool that nobody serves.
  Workers workers(3);
  const Kernel wide(workers, Kind::kTernary, 1, 1030, 1040);
  std::vector<std::thread> callers;
  std::vector<int64_t> wrong(8);
  const Activations x(40, wide, false);
  for (int c = 0; c < 8; ++c) {
    callers.emplace_back([&, c] {
      for (int turn = 0; turn < 4; ++turn) wrong[c] += WrongSums(workers, wide, x);
    });
  }
  for (auto& caller : callers) caller.join();
  for (const int64_t w : wrong) failures += w;
  Gone gone;
  failures += WrongSums(gone, wide, x);
  failures += WrongCodes(gone);
  failures += WrongQuantized(workers);
  for (const int64_t dim : {12, 64, 80, 128}) {
    for (const int64_t length : {1, 5}) {
      failures += WrongAttention<float>(workers, length, 300, dim);
      failures += WrongAttention<float>(gone, length, 7, dim);
      failures += WrongAttention<BFloat16>(workers, length, 130, dim);
    }
  }
  for (int h = 0; HasherHere(h) != nullptr; ++h) failures += WrongDigests(*HasherHere(h));
  auto bytes = Exactly<uint8_t>(int64_t{3} << 20);
  std::fill_n(bytes.get(), int64_t{3} << 20, 1);
  failures += Read(workers, bytes.get(), int64_t{3} << 20, 1) !=
              uint64_t{3} * (uint64_t{1} << 17) * 0x0101010101010101u;
  failures += Busy(workers, 100) < 100;
  std::printf("%lld failures\n", static_cast<long long>(failures));
  return failures != 0;
}
