#include "product.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitnet {
namespace {

std::atomic<const Path*> chosen{nullptr};

// Of ThreadsFor's units. By count: between the GOP/s of AVX2 and of AVX512, and the GB/s of the
// third and the second cache.
constexpr int64_t kMultiplicationsPerUnit = 128, kBytesPerUnit = 32;

void Narrow(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, count * sizeof(float));
}

// Half to even; NaN stays NaN.
void Narrow(const float* from, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    to[i].bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded);
  }
}

// Weights of stored int8 codes that are laid out at a time: 16 KB. On a Zen 5, 128 to 1024 take the
// same time within 3 %, but with AVX2, where 64 rows take a tenth longer by 128.
constexpr int64_t kStoredStep = 256;

Strides StridesOf(bool transposed, int64_t depth, int64_t outputs) {
  return transposed ? Strides{1, depth} : Strides{outputs, 1};
}

template <class T>
T* Scratch(int64_t size) {
  // Kept by the thread: an allocation of this size would be mapped and zeroed each time.
  thread_local std::vector<T> scratch;
  if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
  return scratch.data();
}

// The product cut into pieces: some rows by kPanels panels of one slice of the batch.
class Pieces {
 public:
  Pieces(const Product& product, const Path& path)
      : product_(product),
        path_(path),
        panels_(Panels(product.outputs)),
        byte_rows_(ByteRows(product.kind, product.depth)),
        part_depth_(product.depth / product.parts),
        quads_(CeilDiv(panels_, kPanels)),
        slabs_(CeilDiv(product.rows, path.tuning->slab.load(std::memory_order_relaxed))),
        slab_(CeilDiv(product.rows, slabs_)),
        totals_(product.batch * product.Sums() * product.rows) {
    int32_t* total = totals_.data();
    for (int64_t b = 0; b < product.batch; ++b) {
      for (int64_t s = 0; s < product.Sums(); ++s) {
        for (int64_t m = 0; m < product.rows; ++m) {
          *total++ = path.total(Codes(b, s, m), part_depth_);
        }
      }
    }
  }

  struct Piece {
    int64_t batch, row, rows, output, outputs;
  };

  // Adjacent pieces share their rows of x, and go on in memory through the panels.
  template <class Work>
  void Each(Pool& pool, const Work& work) const {
    const int64_t pieces = product_.batch * slabs_ * quads_;
    const int64_t bytes = product_.batch * product_.groups * panels_ * byte_rows_ * kRowBytes;
    const int64_t units = bytes / kBytesPerUnit + bytes * RowDepth(product_.kind) / 16 / 4 *
                                                      product_.rows / kMultiplicationsPerUnit;
    const auto run = [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t quad = piece % quads_, slab = piece / quads_ % slabs_;
        const int64_t row = slab * slab_, output = quad * kWidth;
        work(Piece{piece / quads_ / slabs_, row, std::min(slab_, product_.rows - row), output,
                   std::min(kWidth, product_.outputs - output)});
      }
    };
    ParallelFor(pool, pieces, ThreadsFor(pool, units), run);
  }

  // Sums of one part of a group of a piece: (rows, kWidth).
  void Sum(const Piece& piece, int64_t group, int64_t part, int32_t* sums) const {
    const int64_t sum = group * product_.parts + part;
    const int64_t panel = (piece.batch * product_.groups + group) * panels_ +
                          piece.output / kOutputs;  // the first of four
    const int64_t total = (piece.batch * product_.Sums() + sum) * product_.rows + piece.row;
    const Rows rows{Codes(piece.batch, sum, piece.row), product_.stride, piece.rows,
                    totals_.data() + total};
    const bool ternary = product_.kind == Kind::kTernary, stored = product_.stored != nullptr;
    if (stored && !ternary) return SumStored(piece, rows, part, sums);
    const int64_t fours = part_depth_ / 4;
    const Fours run = product_.parts > 1 ? Fours{part * fours, fours}
                                         : AllOf(product_.kind, byte_rows_);  // padded
    if (stored) {
      // Laid out once for all rows of the piece, which is what panels are for.
      uint8_t* panels = Scratch<uint8_t>(byte_rows_ * kPanels * kRowBytes);
      const int64_t slice = piece.batch * product_.groups + group;
      path_.lay_out_ternary(
          product_.stored + slice * product_.depth * product_.outputs + piece.output,
          product_.outputs, piece.outputs, product_.depth, panels);
      return path_.ternary(rows, {panels, byte_rows_, Panels(piece.outputs), run}, sums);
    }
    const Sums multiply = ternary ? path_.ternary : path_.int8;
    multiply(
        rows,
        {product_.panels + panel * byte_rows_ * kRowBytes, byte_rows_, Panels(piece.outputs), run},
        sums);
  }

  int64_t slab() const { return slab_; }

 private:
  // The same from codes as they are stored: laid out a step at a time, which stays in L1.
  void SumStored(const Piece& piece, Rows rows, int64_t part, int32_t* sums) const {
    alignas(kRowBytes) uint8_t panels[kStoredStep / 4 * kPanels * kRowBytes];
    const Strides strides = StridesOf(product_.transposed, product_.depth, product_.outputs);
    const int64_t kernel = piece.batch * product_.depth * product_.outputs;
    const int8_t* from = product_.stored + kernel + part * part_depth_ * strides.weight +
                         piece.output * strides.output;
    for (int64_t k = 0; k < part_depth_; k += kStoredStep) {
      const int64_t depth = std::min(kStoredStep, part_depth_ - k);
      const int64_t byte_rows = ByteRows(Kind::kInt8, depth);
      const bool last = k + kStoredStep >= part_depth_;
      const int8_t* at = from + k * strides.weight;
      const int8_t* next =
          last ? from + kWidth * strides.output : at + kStoredStep * strides.weight;
      path_.lay_out(at, strides, piece.outputs, depth, next, panels);
      path_.int8(rows, {panels, byte_rows, Panels(piece.outputs), AllOf(Kind::kInt8, byte_rows)},
                 sums);
      rows.codes += kStoredStep;
      rows.totals = nullptr;
    }
  }

  const int8_t* Codes(int64_t batch, int64_t sum, int64_t row) const {
    return product_.x + (batch * product_.rows + row) * product_.stride + sum * part_depth_;
  }

  const Product& product_;
  const Path& path_;
  int64_t panels_, byte_rows_, part_depth_, quads_, slabs_, slab_;
  std::vector<int32_t> totals_;
};

bool Empty(const Product& product) {
  return product.batch == 0 || product.rows == 0 || product.outputs == 0;
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

// Advises on the large pages that an array touches, whole ones or all. A hint: what the
// kernel cannot do it leaves alone, and what else lies in a page keeps its bytes.
void Advise(const void* data, int64_t bytes, bool whole, int advice) {
  constexpr uintptr_t kLarge = uintptr_t{1} << 21;
  uintptr_t first = reinterpret_cast<uintptr_t>(data), last = first + bytes;
  first = (whole ? first + kLarge - 1 : first) / kLarge * kLarge;
  last = (whole ? last : last + kLarge - 1) / kLarge * kLarge;
  for (; first < last; first += kLarge) madvise(reinterpret_cast<void*>(first), kLarge, advice);
}

// Codes are read end to end, and small pages take a quarter of the speed: prefetching
// stops at their ends. So they are asked for before an array is written for the first
// time, and at its ends, which it shares with its neighbours, afterwards.
void WantLargePages(const void* data, int64_t bytes) { Advise(data, bytes, true, MADV_HUGEPAGE); }
void MakeLargePages(const void* data, int64_t bytes) { Advise(data, bytes, false, MADV_COLLAPSE); }
#else
void WantLargePages(const void*, int64_t) {}
void MakeLargePages(const void*, int64_t) {}
#endif

}  // namespace

const Path& Chosen() {
  const Path* path = chosen.load(std::memory_order_acquire);
  if (path == nullptr) {
    path = *std::find_if(kPaths, kPaths + kPathCount - 1,
                         [](const Path* p) { return p->supported(); });
    chosen.store(path, std::memory_order_release);
  }
  return *path;
}

void Choose(const Path& path) { chosen.store(&path, std::memory_order_release); }

std::atomic<int64_t>& ConstantOf(const Path& path, int constant) {
  Tuning& tuning = *path.tuning;
  return constant == 0 ? tuning.direct_rows : constant == 1 ? tuning.slab : tuning.step_rows;
}

bool Tune(const Path& path, int constant, int64_t value) {
  std::atomic<int64_t>& there = ConstantOf(path, constant);
  const bool steps = &there == &path.tuning->step_rows;
  if (value < 1 || there.load() == 0) return false;
  if (steps && (value % kBlockRows != 0 || value > path.most_step_rows)) return false;
  there.store(value);
  return true;
}

namespace {

float QuantizeBy(const Path& path, const float* x, int64_t length, float qmax, float eps,
                 int8_t* codes) {
  return path.quantize(x, length, qmax, eps, codes);
}

float QuantizeBy(const Path& path, const BFloat16* x, int64_t length, float qmax, float eps,
                 int8_t* codes) {
  return path.quantize_bfloat16(x, length, qmax, eps, codes);
}

void Widen(const float* x, int64_t length, float* to) {
  std::memcpy(to, x, length * sizeof(float));
}

void Widen(const BFloat16* x, int64_t length, float* to) {
  for (int64_t i = 0; i < length; ++i) {
    const uint32_t bits = uint32_t{x[i].bits} << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

}  // namespace

template <class Float>
void QuantizeRows(Pool& pool, const Float* x, int64_t rows, int64_t length, Rotation rotation,
                  int64_t groups, int64_t stride, float qmax, float eps, int8_t* codes,
                  float* gamma) {
  const Path& path = Chosen();
  const auto quantize = [&](const auto* from, int64_t m) {
    const int64_t depth = length / groups;
    for (int64_t g = 0; g < groups; ++g) {
      gamma[m * groups + g] =
          QuantizeBy(path, from + g * depth, depth, qmax, eps, codes + m * stride + g * depth);
    }
  };
  const int64_t threads = ThreadsFor(pool, rows * length / kFloatsPerUnit);
  ParallelFor(pool, rows, threads, [&](int64_t first, int64_t last) {
    float* rotated = rotation.block > 1 ? Scratch<float>(length) : nullptr;
    for (int64_t m = first; m < last; ++m) {
      if (rotated == nullptr) {
        quantize(x + m * length, m);
      } else {
        Widen(x + m * length, length, rotated);
        path.rotate(rotated, length, rotation.block, rotation.factor);
        quantize(rotated, m);
      }
      std::memset(codes + m * stride + length, 0, stride - length);
    }
  });
}

void MultiplyToSums(Pool& pool, const Product& product, int32_t* sums) {
  if (Empty(product)) return;
  const Pieces pieces(product, Chosen());
  pieces.Each(pool, [&](const Pieces::Piece& piece) {
    int32_t* some = Scratch<int32_t>(pieces.slab() * kWidth);
    for (int64_t s = 0; s < product.Sums(); ++s) {
      pieces.Sum(piece, s / product.parts, s % product.parts, some);
      const int64_t first = (piece.batch * product.Sums() + s) * product.rows + piece.row;
      for (int64_t m = 0; m < piece.rows; ++m) {
        std::memcpy(sums + (first + m) * product.outputs + piece.output, some + m * kWidth,
                    piece.outputs * sizeof(int32_t));
      }
    }
  });
}

template <class Float>
void Multiply(Pool& pool, const Product& product, const Scales& scales, Float* y) {
  if (Empty(product)) return;
  const Path& path = Chosen();
  const Pieces pieces(product, path);
  constexpr bool kFloat32 = sizeof(Float) == sizeof(float);
  const bool several = product.Sums() > 1, in_place = kFloat32 && !several;
  const float reciprocal = static_cast<float>(1.0 / scales.qmax);
  const int64_t of_gamma = product.Sums() / scales.gammas;  // sums that share one
  const int64_t step = scales.scales == 1 ? 0 : 1;
  pieces.Each(pool, [&](const Pieces::Piece& piece) {
    const int64_t size = pieces.slab() * kWidth;
    int32_t* sums = Scratch<int32_t>(size);
    Float* to = y + (piece.batch * product.rows + piece.row) * product.outputs + piece.output;
    float* wide = in_place ? reinterpret_cast<float*>(to) : Scratch<float>(size);
    const int64_t wide_stride = in_place ? product.outputs : kWidth;
    // Several sums start from +0, as their total does: -0 of the first would not survive it.
    if (several) std::fill_n(wide, piece.rows * kWidth, 0.0f);
    const float* gamma = scales.gamma + (piece.batch * product.rows + piece.row) * scales.gammas;
    const float* scale =
        scales.scale + piece.batch * product.groups * scales.scales + step * piece.output;
    int64_t left = of_gamma;
    for (int64_t g = 0; g < product.groups; ++g, scale += scales.scales) {
      for (int64_t p = 0; p < product.parts; ++p) {
        pieces.Sum(piece, g, p, sums);
        path.finish({sums, piece.rows, piece.outputs, gamma, scales.gammas, scale, step, reciprocal,
                     several, wide, wide_stride});
        if (--left == 0) ++gamma, left = of_gamma;
      }
    }
    if (in_place) return;
    for (int64_t m = 0; m < piece.rows; ++m) {
      Narrow(wide + m * kWidth, piece.outputs, to + m * product.outputs);
    }
  });
}

namespace {

// Panel `piece` of all of a ternary kernel, and four panels of an int8 one.
void LayOutPanel(const Stored& stored, int64_t piece, uint8_t* panels) {
  const int64_t count = Panels(stored.outputs), byte_rows = ByteRows(stored.kind, stored.depth);
  const int64_t panel = piece % count, g = piece / count % stored.groups;
  const int64_t kernel = piece / count / stored.groups * stored.rows * stored.outputs;
  const PanelAt at = FindPanel(panel, count, byte_rows);
  LayOutTernary(static_cast<const uint8_t*>(stored.codes) + kernel, stored.outputs, stored.last,
                stored.depth, g, panel, panels + (piece - panel) * byte_rows * kRowBytes + at.start,
                at.row);
}

void LayOutQuad(const Stored& stored, int64_t piece, uint8_t* panels) {
  const int64_t count = Panels(stored.outputs), quads = CeilDiv(count, kPanels);
  const int64_t batch = piece / quads, quad = piece % quads, output = quad * kWidth;
  const Strides strides = StridesOf(stored.transposed, stored.depth, stored.outputs);
  const int64_t start = batch * stored.rows * stored.outputs + output * strides.output;
  Chosen().lay_out(
      static_cast<const int8_t*>(stored.codes) + start, strides,
      std::min(kWidth, stored.outputs - output), stored.depth, nullptr,
      panels + (batch * count + quad * kPanels) * ByteRows(stored.kind, stored.depth) * kRowBytes);
}

}  // namespace

void LayOut(Pool& pool, const Stored& stored, uint8_t* panels) {
  const bool ternary = stored.kind == Kind::kTernary;
  const int64_t count = Panels(stored.outputs);
  const int64_t pieces = stored.batch * (ternary ? stored.groups * count : CeilDiv(count, kPanels));
  const int64_t bytes =
      stored.batch * stored.groups * count * ByteRows(stored.kind, stored.depth) * kRowBytes;
  WantLargePages(panels, bytes);
  ParallelFor(pool, pieces, ThreadsFor(pool, bytes), [&](int64_t from, int64_t to) {
    for (; from < to; ++from) {
      ternary ? LayOutPanel(stored, from, panels) : LayOutQuad(stored, from, panels);
    }
  });
  MakeLargePages(panels, bytes);
}

template void QuantizeRows(Pool&, const float*, int64_t, int64_t, Rotation, int64_t, int64_t, float,
                           float, int8_t*, float*);
template void QuantizeRows(Pool&, const BFloat16*, int64_t, int64_t, Rotation, int64_t, int64_t,
                           float, float, int8_t*, float*);
template void Multiply(Pool&, const Product&, const Scales&, float*);
template void Multiply(Pool&, const Product&, const Scales&, BFloat16*);

}  // namespace bitnet
