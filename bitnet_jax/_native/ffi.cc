// XLA's door to the operations of product.h: shapes and dtypes are checked here, and the
// threads are those of XLA's own pool.

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <string>
#include <vector>

#include "attend.h"
#include "product.h"
#include "quantize.h"
#include "sha256.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define BITNET_EXPORT extern "C" __attribute__((visibility("default")))

namespace bitnet {
namespace {

using Type = ffi::DataType;
using Dimensions = ffi::Span<const int64_t>;

class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool) {}
  int64_t Threads() const override { return std::max<int64_t>(1, pool_.num_threads()); }
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

ffi::Error Wrong(const char* what) {
  return ffi::Error::InvalidArgument(std::string("bitnet_jax: ") + what +
                                     "; prepare the kernel again with bj.prepare");
}

bool EndsWith(Dimensions dimensions, std::initializer_list<int64_t> wanted) {
  return dimensions.size() >= wanted.size() &&
         std::equal(wanted.begin(), wanted.end(), dimensions.end() - wanted.size());
}

bool Is(Dimensions dimensions, std::initializer_list<int64_t> wanted) {
  return dimensions.size() == wanted.size() && EndsWith(dimensions, wanted);
}

int64_t ElementsBefore(Dimensions dimensions, size_t last) {
  int64_t elements = 1;
  for (size_t axis = 0; axis + last < dimensions.size(); ++axis) elements *= dimensions[axis];
  return elements;
}

// x (..., K) float32 or bfloat16 -> codes (..., at least K) int8, gamma (..., groups) float32.
// Blocks of more than 1 are rotated first, times `factor`.
ffi::Error QuantizeImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, float qmax, float eps,
                        int64_t block, float factor, ffi::ResultBuffer<ffi::S8> codes,
                        ffi::ResultBuffer<ffi::F32> gamma) {
  const Dimensions xd = x.dimensions(), cd = codes->dimensions(), gd = gamma->dimensions();
  if (xd.size() == 0 || cd.size() != xd.size() || cd.back() < xd.back() ||
      ElementsBefore(cd, 1) != ElementsBefore(xd, 1) || gd.size() != xd.size() ||
      ElementsBefore(gd, 1) != ElementsBefore(xd, 1) || gd.back() < 1 ||
      xd.back() % gd.back() != 0) {
    return Wrong("want x (..., K), codes (..., K or more), gamma (..., a divisor of K)");
  }
  const bool is_block = block >= 4 && (block & (block - 1)) == 0 && xd.back() % block == 0;
  if (block != 1 && !is_block) return Wrong("want a power of two, 1 or from 4, that divides K");
  XlaPool pool(threads);
  const int64_t rows = ElementsBefore(xd, 1);
  const auto run = [&](const auto* from) {
    QuantizeRows(pool, from, rows, xd.back(), {block, factor}, gd.back(), cd.back(), qmax, eps,
                 codes->typed_data(), gamma->typed_data());
    return ffi::Error::Success();
  };
  if (x.element_type() == Type::F32) return run(x.typed_data<float>());
  if (x.element_type() == Type::BF16) return run(static_cast<BFloat16*>(x.untyped_data()));
  return Wrong("x must be float32 or bfloat16");
}

// w (..., K, N) float32 or bfloat16 -> codes (..., K, N) int8, scale (..., G, 1 or N) float32.
ffi::Error QuantizeKernelImpl(ffi::ThreadPool threads, ffi::AnyBuffer w, float threshold, float eps,
                              bool survivors, ffi::ResultBuffer<ffi::S8> codes,
                              ffi::ResultBuffer<ffi::F32> scale) {
  const Dimensions wd = w.dimensions(), cd = codes->dimensions(), sd = scale->dimensions();
  if (wd.size() < 2 || sd.size() != wd.size() ||
      !std::equal(wd.begin(), wd.end(), cd.begin(), cd.end()) ||
      !std::equal(wd.begin(), wd.end() - 2, sd.begin())) {
    return Wrong("want w and codes (..., K, N), scale (..., G, 1 or N)");
  }
  const int64_t batch = ElementsBefore(wd, 2), depth = wd[wd.size() - 2], outputs = wd.back();
  const int64_t groups = sd[sd.size() - 2], scales = sd.back();
  if (groups < 1 || depth % groups != 0 || (scales != 1 && scales != outputs)) {
    return Wrong("want w and codes (..., K, N), scale (..., a divisor of K, 1 or N)");
  }
  XlaPool pool(threads);
  const Ternarized kernel{batch * groups, depth / groups, outputs, scales == 1,
                          survivors,      threshold,      eps};
  const auto run = [&](const auto* from) {
    QuantizeKernel(pool, kernel, from, codes->typed_data(), scale->typed_data());
    return ffi::Error::Success();
  };
  if (w.element_type() == Type::F32) return run(w.typed_data<float>());
  if (w.element_type() == Type::BF16) return run(static_cast<BFloat16*>(w.untyped_data()));
  return Wrong("w must be float32 or bfloat16");
}

int64_t PanelBytes(Kind kind, int64_t groups, int64_t outputs, int64_t depth) {
  return groups * Panels(outputs) * ByteRows(kind, depth) * kRowBytes;
}

// The operands that MultiplyImpl and SumsImpl share, or why they do not meet. Panels are one
// flat axis: XLA cuts a layer out of a stack of them several times as fast. With `at`, they
// are those of a slice of a stack, and B is 1. Int8 codes instead of bytes are stored ones,
// (B, depth, outputs), or (B, outputs, depth) transposed.
ffi::Error Operands(ffi::Buffer<ffi::S8> x, ffi::AnyBuffer panels, int64_t groups, int64_t depth,
                    int64_t parts, bool int8, bool transposed, int64_t outputs, Product& product,
                    const int32_t* at = nullptr) {
  const Dimensions xd = x.dimensions();
  if (xd.size() != 3 || groups < 1 || outputs < 0) {
    return Wrong("want x (B, M, K), panels (B, bytes), and a group or more");
  }
  if (depth < 1 || parts < 1 || depth % parts != 0 || (parts > 1 && depth / parts % 4 != 0)) {
    return Wrong("want groups of depth >= 1, in parts of a multiple of 4 weights");
  }
  const int64_t part = depth / parts;
  if (groups * depth - part + CeilDiv(part, kPadding) * kPadding > xd[2]) {
    return Wrong("want each part readable up to a multiple of 64 codes of x");
  }
  const Kind kind = int8 ? Kind::kInt8 : Kind::kTernary;
  const int64_t bytes = PanelBytes(kind, groups, outputs, depth);
  const Dimensions pd = panels.dimensions();
  if (panels.element_type() == Type::S8) {
    const int64_t first = transposed ? outputs : depth, last = transposed ? depth : outputs;
    if (!int8 || groups != 1 || at != nullptr || !Is(pd, {xd[0], first, last})) {
      return Wrong("x, stored codes and outputs do not meet");
    }
    product = {kind,
               xd[0],
               xd[1],
               outputs,
               groups,
               depth,
               parts,
               x.typed_data(),
               xd[2],
               nullptr,
               static_cast<const int8_t*>(panels.untyped_data()),
               transposed};
    return ffi::Error::Success();
  }
  if (panels.element_type() != Type::U8) return Wrong("panels must be uint8");
  const int64_t slices = at == nullptr || pd.size() == 0 ? xd[0] : pd[0];
  if (!Is(pd, {slices, bytes}) || (at != nullptr && (xd[0] != 1 || *at < 0 || *at >= slices))) {
    return Wrong("x, panels and outputs do not meet");
  }
  const auto* first = static_cast<const uint8_t*>(panels.untyped_data());
  product = {kind,  xd[0], xd[1],          outputs, groups,
             depth, parts, x.typed_data(), xd[2],   first + (at == nullptr ? 0 : *at * bytes)};
  return ffi::Error::Success();
}

// x (B, M, K) int8, gamma (B, M, A), panels, scale (B, G, 1 or N) -> y (B, M, N). The groups
// of x and of the kernel are summed together where they are alike, else in the fewest parts
// that cut neither. With one more operand, an index, panels are a stack (S, bytes), of which one
// slice is read, and B is 1.
ffi::Error MultiplyImpl(ffi::ThreadPool threads, ffi::Buffer<ffi::S8> x,
                        ffi::Buffer<ffi::F32> gamma, ffi::AnyBuffer panels,
                        ffi::Buffer<ffi::F32> scale, ffi::RemainingArgs rest, int64_t depth,
                        bool int8, bool transposed, float qmax, ffi::Result<ffi::AnyBuffer> y) {
  const int32_t* at = nullptr;
  if (rest.size() > 0) {
    const auto index = rest.get<ffi::Buffer<ffi::S32>>(0);
    if (!index.has_value() || index->element_count() != 1) return Wrong("want one index");
    at = index->typed_data();
  }
  const Dimensions yd = y->dimensions(), sd = scale.dimensions(), gd = gamma.dimensions();
  if (yd.size() != 3 || sd.size() != 3 || gd.size() != 3 || gd[2] < 1 || sd[1] < 1) {
    return Wrong("want y (B, M, N), gamma (B, M, A), scale (B, G, 1 or N)");
  }
  Product product;
  const int64_t gammas = gd[2], parts = gammas / std::gcd(gammas, sd[1]);
  const ffi::Error error =
      Operands(x, panels, sd[1], depth, parts, int8, transposed, yd[2], product, at);
  if (error.failure()) return error;
  const int64_t scales = sd[2];
  if (!Is(yd, {product.batch, product.rows, product.outputs}) ||
      !Is(gd, {product.batch, product.rows, gammas}) ||
      !Is(sd, {product.batch, product.groups, scales}) ||
      (scales != 1 && scales != product.outputs)) {
    return Wrong("gamma, scale and y do not meet the product");
  }
  XlaPool pool(threads);
  const auto run = [&](auto* to) {
    Multiply(pool, product, {gamma.typed_data(), gammas, scale.typed_data(), scales, qmax}, to);
    return ffi::Error::Success();
  };
  if (y->element_type() == Type::F32) return run(y->typed_data<float>());
  if (y->element_type() == Type::BF16) return run(static_cast<BFloat16*>(y->untyped_data()));
  return Wrong("y must be float32 or bfloat16");
}

// x (B, M, K) int8, gamma (B, M, A), ternary codes w (B, K, N), scale (B, G, 1 or N)
// -> y (B, M, N) float32.
ffi::Error MultiplyCodesImpl(ffi::ThreadPool threads, ffi::Buffer<ffi::S8> x,
                             ffi::Buffer<ffi::F32> gamma, ffi::Buffer<ffi::S8> w,
                             ffi::Buffer<ffi::F32> scale, float qmax,
                             ffi::ResultBuffer<ffi::F32> y) {
  const Dimensions xd = x.dimensions(), gd = gamma.dimensions(), wd = w.dimensions(),
                   sd = scale.dimensions();
  if (xd.size() != 3 || gd.size() != 3 || wd.size() != 3 || sd.size() != 3 || sd[1] < 1 ||
      gd[2] < 1 || wd[1] % sd[1] != 0 || !Is(xd, {wd[0], xd[1], wd[1]}) ||
      !Is(gd, {xd[0], xd[1], gd[2]}) || (sd[2] != 1 && sd[2] != wd[2]) || sd[0] != wd[0] ||
      !Is(y->dimensions(), {xd[0], xd[1], wd[2]})) {
    return Wrong("want x (B, M, K), gamma (B, M, A), w (B, K, N), scale (B, G, 1 or N)");
  }
  const int64_t groups = sd[1], depth = wd[1] / groups, parts = gd[2] / std::gcd(gd[2], groups);
  if (depth % parts != 0 || (parts > 1 && depth / parts % 4 != 0)) {
    return Wrong("want groups of depth >= 1, in parts of a multiple of 4 weights");
  }
  // Rows are read in whole tiles: behind the last weights of each there must be zeros.
  const int64_t part = depth / parts, stride = xd[2] - part + CeilDiv(part, kPadding) * kPadding;
  std::vector<int8_t> padded(stride == xd[2] ? 0 : xd[0] * xd[1] * stride);
  for (int64_t row = 0; stride != xd[2] && row < xd[0] * xd[1]; ++row) {
    std::memcpy(padded.data() + row * stride, x.typed_data() + row * xd[2], xd[2]);
  }
  XlaPool pool(threads);
  const Kind kind = Chosen().int8_alike && groups == 1 ? Kind::kInt8 : Kind::kTernary;
  const Product product{
      kind,   xd[0],   xd[1],         wd[2],
      groups, depth,   parts,         padded.empty() ? x.typed_data() : padded.data(),
      stride, nullptr, w.typed_data()};
  Multiply(pool, product, Scales{gamma.typed_data(), gd[2], scale.typed_data(), sd[2], qmax},
           y->typed_data());
  return ffi::Error::Success();
}

// x (B, M, K) int8, panels -> sums (B, G, M, N) int32.
ffi::Error SumsImpl(ffi::ThreadPool threads, ffi::Buffer<ffi::S8> x, ffi::AnyBuffer panels,
                    int64_t depth, bool int8, bool transposed, ffi::ResultBuffer<ffi::S32> sums) {
  const Dimensions yd = sums->dimensions();
  if (yd.size() != 4) return Wrong("want sums (B, G, M, N)");
  Product product;
  const ffi::Error error = Operands(x, panels, yd[1], depth, 1, int8, transposed, yd[3], product);
  if (error.failure()) return error;
  if (!Is(yd, {product.batch, product.groups, product.rows, product.outputs})) {
    return Wrong("sums do not meet the product");
  }
  XlaPool pool(threads);
  MultiplyToSums(pool, product, sums->typed_data());
  return ffi::Error::Success();
}

// stored (..., rows, N), ternary bytes or int8 codes, or int8 (..., N, rows) transposed
// -> panels (..., bytes).
ffi::Error LayOutImpl(ffi::ThreadPool threads, ffi::AnyBuffer stored, int64_t last, int64_t depth,
                      bool int8, bool transposed, ffi::ResultBuffer<ffi::U8> panels) {
  const Dimensions sd = stored.dimensions(), pd = panels->dimensions();
  if (sd.size() < 2 || pd.size() != sd.size() - 1 || last < 1 || depth < 1) {
    return Wrong("want stored (..., rows, N), panels (..., bytes)");
  }
  const Kind kind = int8 ? Kind::kInt8 : Kind::kTernary;
  const int64_t batch = ElementsBefore(sd, 2);
  const int64_t rows = sd[sd.size() - (transposed ? 1 : 2)];
  const int64_t outputs = sd[sd.size() - (transposed ? 2 : 1)];
  const int64_t bytes = CeilDiv(last, kFields);  // of `last` weights
  const int64_t length = int8 ? rows : rows / bytes * last, groups = length / depth;
  if (stored.element_type() != (int8 ? Type::S8 : Type::U8) || (transposed && !int8) ||
      (int8 && groups != 1) || (!int8 && rows % bytes != 0) || length % depth != 0 ||
      ElementsBefore(pd, 1) != batch || pd.back() != PanelBytes(kind, groups, outputs, depth)) {
    return Wrong("stored codes and panels do not meet");
  }
  XlaPool pool(threads);
  LayOut(pool, {kind, stored.untyped_data(), batch, rows, outputs, last, groups, depth, transposed},
         panels->typed_data());
  return ffi::Error::Success();
}

ffi::Error ReadImpl(ffi::ThreadPool threads, ffi::AnyBuffer from, int64_t streams,
                    ffi::ResultBuffer<ffi::U32> sum) {
  if (streams != 1 && streams != kPanels) return Wrong("streams must be 1 or 4");
  XlaPool pool(threads);
  *sum->typed_data() =
      static_cast<uint32_t>(Read(pool, static_cast<const uint8_t*>(from.untyped_data()),
                                 static_cast<int64_t>(from.size_bytes()), streams));
  return ffi::Error::Success();
}

ffi::Error BusyImpl(ffi::ThreadPool threads, int64_t turns, ffi::ResultBuffer<ffi::F32> done) {
  XlaPool pool(threads);
  *done->typed_data() = static_cast<float>(Busy(pool, turns));
  return ffi::Error::Success();
}

// q (B, L, H, D) float32, k and v (S, B, T, G, D) float32 or bfloat16, of which slice `at` is
// read, mask (B, L, T) -> y (B, L, H, D) float32.
ffi::Error AttendImpl(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k,
                      ffi::AnyBuffer v, ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::S32> at,
                      ffi::ResultBuffer<ffi::F32> y) {
  const Dimensions qd = q.dimensions(), sd = k.dimensions();
  if (qd.size() != 4 || sd.size() != 5 || at.element_count() != 1) {
    return Wrong("want q (B, L, H, D), k and v (S, B, T, G, D), and an index");
  }
  const int64_t slice = *at.typed_data(), kd[] = {sd[1], sd[2], sd[3], sd[4]};
  if (slice < 0 || slice >= sd[0] || kd[2] < 1 || qd[2] % kd[2] != 0 ||
      !EndsWith(sd, {qd[0], kd[1], kd[2], qd[3]}) ||
      !Is(v.dimensions(), {sd[0], kd[0], kd[1], kd[2], kd[3]}) ||
      !Is(mask.dimensions(), {qd[0], qd[1], kd[1]}) ||
      !Is(y->dimensions(), {qd[0], qd[1], qd[2], qd[3]}) || k.element_type() != v.element_type()) {
    return Wrong("want q and y (B, L, H, D), k and v (S, B, T, G, D), mask (B, L, T)");
  }
  const int64_t begin = slice * kd[0] * kd[1] * kd[2] * kd[3];
  XlaPool pool(threads);
  const auto run = [&](auto key) {
    using Key = decltype(key);
    Attend(pool, Attention<Key>{q.typed_data(), static_cast<const Key*>(k.untyped_data()) + begin,
                                static_cast<const Key*>(v.untyped_data()) + begin,
                                static_cast<const uint8_t*>(mask.untyped_data()), qd[0], qd[1],
                                qd[2], kd[1], kd[2], qd[3], y->typed_data()});
    return ffi::Error::Success();
  };
  if (k.element_type() == Type::F32) return run(float{});
  if (k.element_type() == Type::BF16) return run(BFloat16{});
  return Wrong("k must be float32 or bfloat16");
}

}  // namespace
}  // namespace bitnet

// XLA_FFI_DEFINE_HANDLER_SYMBOL, but for the visibility.
#define BITNET_HANDLER(symbol, implementation, binding)              \
  XLA_FFI_DEFINE_HANDLER(symbol##_handler, implementation, binding); \
  BITNET_EXPORT XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame) { return symbol##_handler(frame); }

BITNET_HANDLER(bitnet_quantize, bitnet::QuantizeImpl,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::AnyBuffer>()
                   .Attr<float>("qmax")
                   .Attr<float>("eps")
                   .Attr<int64_t>("block")
                   .Attr<float>("factor")
                   .Ret<ffi::Buffer<ffi::S8>>()
                   .Ret<ffi::Buffer<ffi::F32>>())

BITNET_HANDLER(bitnet_quantize_kernel, bitnet::QuantizeKernelImpl,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::AnyBuffer>()
                   .Attr<float>("threshold")
                   .Attr<float>("eps")
                   .Attr<bool>("survivors")
                   .Ret<ffi::Buffer<ffi::S8>>()
                   .Ret<ffi::Buffer<ffi::F32>>())

BITNET_HANDLER(bitnet_multiply, bitnet::MultiplyImpl,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::Buffer<ffi::S8>>()
                   .Arg<ffi::Buffer<ffi::F32>>()
                   .Arg<ffi::AnyBuffer>()
                   .Arg<ffi::Buffer<ffi::F32>>()
                   .RemainingArgs()
                   .Attr<int64_t>("depth")
                   .Attr<bool>("int8")
                   .Attr<bool>("transposed")
                   .Attr<float>("qmax")
                   .Ret<ffi::AnyBuffer>())

BITNET_HANDLER(bitnet_multiply_codes, bitnet::MultiplyCodesImpl,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::Buffer<ffi::S8>>()
                   .Arg<ffi::Buffer<ffi::F32>>()
                   .Arg<ffi::Buffer<ffi::S8>>()
                   .Arg<ffi::Buffer<ffi::F32>>()
                   .Attr<float>("qmax")
                   .Ret<ffi::Buffer<ffi::F32>>())

BITNET_HANDLER(bitnet_sums, bitnet::SumsImpl,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::Buffer<ffi::S8>>()
                   .Arg<ffi::AnyBuffer>()
                   .Attr<int64_t>("depth")
                   .Attr<bool>("int8")
                   .Attr<bool>("transposed")
                   .Ret<ffi::Buffer<ffi::S32>>())

BITNET_HANDLER(bitnet_lay_out, bitnet::LayOutImpl,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::AnyBuffer>()
                   .Attr<int64_t>("last")
                   .Attr<int64_t>("depth")
                   .Attr<bool>("int8")
                   .Attr<bool>("transposed")
                   .Ret<ffi::Buffer<ffi::U8>>())

BITNET_HANDLER(bitnet_attend, bitnet::AttendImpl,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::Buffer<ffi::F32>>()
                   .Arg<ffi::AnyBuffer>()
                   .Arg<ffi::AnyBuffer>()
                   .Arg<ffi::Buffer<ffi::PRED>>()
                   .Arg<ffi::Buffer<ffi::S32>>()
                   .Ret<ffi::Buffer<ffi::F32>>())

BITNET_HANDLER(bitnet_read, bitnet::ReadImpl,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::AnyBuffer>()
                   .Attr<int64_t>("streams")
                   .Ret<ffi::Buffer<ffi::U32>>())

BITNET_HANDLER(
    bitnet_busy, bitnet::BusyImpl,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("turns").Ret<ffi::Buffer<ffi::F32>>())

// The version of XLA's FFI that this was compiled for: 1000 * major + minor.
BITNET_EXPORT int bitnet_ffi_version() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }

// The name of a path, or null after the last; whether this processor runs it.
BITNET_EXPORT const char* bitnet_path(int index) {
  return index >= 0 && index < bitnet::kPathCount ? bitnet::kPaths[index]->name : nullptr;
}

BITNET_EXPORT int bitnet_path_supported(int index) {
  return index >= 0 && index < bitnet::kPathCount && bitnet::kPaths[index]->supported();
}

// The index of the path that serves.
BITNET_EXPORT int bitnet_chosen_path() {
  return static_cast<int>(
      std::find(bitnet::kPaths, bitnet::kPaths + bitnet::kPathCount, &bitnet::Chosen()) -
      bitnet::kPaths);
}

// A constant of a path (see Tune), or -1 after the last; whether the path takes another value.
BITNET_EXPORT int64_t bitnet_constant(int index, int constant) {
  return constant < bitnet::kConstants ? bitnet::ConstantOf(*bitnet::kPaths[index], constant).load()
                                       : -1;
}

BITNET_EXPORT int bitnet_tune(int index, int constant, int64_t value) {
  return bitnet::Tune(*bitnet::kPaths[index], constant, value);
}

// Takes a path by its index from now on, in every thread.
BITNET_EXPORT void bitnet_choose_path(int index) { bitnet::Choose(*bitnet::kPaths[index]); }

// The name of a hasher, or null after the last that this processor runs; the messages that it
// takes at once.
BITNET_EXPORT const char* bitnet_hasher(int index) {
  const bitnet::Hasher* hasher = bitnet::HasherHere(index);
  return hasher == nullptr ? nullptr : hasher->name;
}

BITNET_EXPORT int bitnet_hasher_streams(int index) {
  return static_cast<int>(bitnet::HasherHere(index)->streams);
}

BITNET_EXPORT void bitnet_sha256(int index, const bitnet::Message* messages, int64_t count,
                                 uint8_t* digests, uint8_t* threes) {
  bitnet::Sha256(*bitnet::HasherHere(index), messages, count, digests, threes);
}
