// The products, written once over an instruction set `I`:
//
//   I::Row, Load, Write, Field(row, j)   a byte row, and its fields j as bytes
//   I::Activations, Every(x)             four activations, in all lanes
//   I::Total<kind>                       sums of the 16 outputs of a row, in registers:
//     Add(codes, x)                      adds 4 products to each, codes unsigned bytes
//     AddTo(to)                          adds them to what is there
//   I::kMostStepRows                     ternary byte rows of a step, whole blocks: as
//                                        many as a Total can take
//   I::kBias[kind]                       what Add takes a code to be too large by
//   I::kTileRows, kTilePanels            the block of sums that stays in registers
//   I::kDirectRows, kSlab, kStepRows     what its Tuning begins with: a step stays in L1
//                                        where a tile takes fewer panels than lie side by
//                                        side
//   I::kInt8Alike                        int8 codes are multiplied as fast as ternary ones
//   I::kIndependent                      Totals that hide the latency of each other's products
//   I::OneRow                            kPanels ternary panels for a single row
//
// One row: codes are read once, from memory, end to end. A few rows: the same, each byte
// unpacked once for all of them. Many rows: panels are unpacked a block of the
// contraction at a time into the int8 layout, which stays in cache, and multiplied from
// there, as int8 kernels are at any number of rows.
//
// A run of a panel that cuts blocks, where activations have groups, goes field by field: in
// registers for one row, unpacked for more.

#pragma once

#include "plain.h"
#include "quantize_kernel.h"
#include "target.h"
#include "unpack.h"

namespace bitnet {
namespace {

// Where each constant comes from stands beside it. Unless another is named, the processor is a
// Zen 5, the kernels are 4096x4096, and the figures are the least of several runs on a machine
// with other work; "one thread" was timed without XLA, the others by `doctor --tune`.

// No end to a step but that of the kernel, or of what is unpacked at a time.
constexpr int64_t kWhole = int64_t{1} << 40;

template <class I>
Tuning tuned = {I::kDirectRows, I::kSlab, I::kStepRows};

inline int64_t Now(const std::atomic<int64_t>& constant) {
  return constant.load(std::memory_order_relaxed);
}

// Four adjacent activations.
inline int32_t Four(const int8_t* x) {
  int32_t value;
  std::memcpy(&value, x, sizeof(value));
  return value;
}

// The same row of P panels, and sums of R rows of x and P panels. Members with names, and
// no arrays: compilers leave an array in memory where they unroll its loops too late,
// which takes half of the speed.
template <class I, int P>
struct Codes {
  typename I::Row a, b, c, d;

  template <bool Ahead>
  BITNET_INLINE void Load(const uint8_t* row) {
    One<Ahead>(a, row);
    if constexpr (P > 1) One<Ahead>(b, row + kRowBytes);
    if constexpr (P > 2) One<Ahead>(c, row + 2 * kRowBytes);
    if constexpr (P > 3) One<Ahead>(d, row + 3 * kRowBytes);
  }

  template <int j>
  BITNET_INLINE Codes Field() const {
    Codes fields;
    fields.a = I::template Field<j>(a);
    if constexpr (P > 1) fields.b = I::template Field<j>(b);
    if constexpr (P > 2) fields.c = I::template Field<j>(c);
    if constexpr (P > 3) fields.d = I::template Field<j>(d);
    return fields;
  }

 private:
  template <bool Ahead>
  static BITNET_INLINE void One(typename I::Row& to, const uint8_t* row) {
    if (Ahead) I::Prefetch(row);
    to = I::Load(row);
  }
};

template <class I, Kind kind, int P>
struct RowSums {
  typename I::template Total<kind> a, b, c, d;

  BITNET_INLINE void Add(const Codes<I, P>& codes, const int8_t* x) {
    const typename I::Activations four = I::Every(x);
    a.Add(codes.a, four);
    if constexpr (P > 1) b.Add(codes.b, four);
    if constexpr (P > 2) c.Add(codes.c, four);
    if constexpr (P > 3) d.Add(codes.d, four);
  }

  BITNET_INLINE void AddTo(int32_t* sums) const {
    a.AddTo(sums);
    if constexpr (P > 1) b.AddTo(sums + kOutputs);
    if constexpr (P > 2) c.AddTo(sums + 2 * kOutputs);
    if constexpr (P > 3) d.AddTo(sums + 3 * kOutputs);
  }
};

template <class I, Kind kind, int R, int P>
struct Tile {
  RowSums<I, kind, P> r0{}, r1{}, r2{}, r3{}, r4{}, r5{};

  BITNET_INLINE void Add(const Codes<I, P>& codes, const int8_t* x, int64_t stride) {
    r0.Add(codes, x);
    if constexpr (R > 1) r1.Add(codes, x + stride);
    if constexpr (R > 2) r2.Add(codes, x + 2 * stride);
    if constexpr (R > 3) r3.Add(codes, x + 3 * stride);
    if constexpr (R > 4) r4.Add(codes, x + 4 * stride);
    if constexpr (R > 5) r5.Add(codes, x + 5 * stride);
  }

  BITNET_INLINE void AddTo(int32_t* sums) const {
    r0.AddTo(sums);
    if constexpr (R > 1) r1.AddTo(sums + kWidth);
    if constexpr (R > 2) r2.AddTo(sums + 2 * kWidth);
    if constexpr (R > 3) r3.AddTo(sums + 3 * kWidth);
    if constexpr (R > 4) r4.AddTo(sums + 4 * kWidth);
    if constexpr (R > 5) r5.AddTo(sums + 5 * kWidth);
  }
};

// Where sums begin: at what takes the bias of their codes back. All else adds to them.
template <class I, Kind kind>
void Begin(const Rows& x, int32_t* sums) {
  if (x.totals == nullptr) return;
  // Unsigned: the sums of biased codes may leave int32 and come back.
  constexpr uint32_t kBias = I::kBias[static_cast<int>(kind)];
  for (int64_t m = 0; m < x.count; ++m) {
    const int32_t start = static_cast<int32_t>(0 - kBias * x.totals[m]);
    for (int64_t n = 0; n < kWidth; ++n) sums[m * kWidth + n] = start;
  }
}

// R rows times P ternary panels, `byte_rows` of them, fields unpacked in registers.
template <class I, int R, int P>
void Direct(const int8_t* x, int64_t stride, Panel codes, int64_t byte_rows, int32_t* sums) {
  Tile<I, Kind::kTernary, R, P> tile;
  Codes<I, P> bytes;
  for (int64_t start = 0; start < byte_rows; start += kBlockRows) {
    const int64_t rows = Least(byte_rows - start, kBlockRows), field_depth = 4 * rows;
    for (int64_t r = 0; r < rows; ++r, codes.bytes += codes.row) {
      const int8_t* at = x + 4 * r;
      bytes.template Load<true>(codes.bytes);
      tile.Add(bytes.template Field<0>(), at, stride);
      tile.Add(bytes.template Field<1>(), at + field_depth, stride);
      tile.Add(bytes.template Field<2>(), at + 2 * field_depth, stride);
      tile.Add(bytes.template Field<3>(), at + 3 * field_depth, stride);
    }
    x += 4 * field_depth;
  }
  tile.AddTo(sums);
}

// R rows times P panels of the int8 layout, `rows` byte rows deep.
template <class I, Kind kind, int R, int P>
void Bytes(const int8_t* x, int64_t stride, Panel codes, int64_t rows, int32_t* sums) {
  Tile<I, kind, R, P> tile;
  Codes<I, P> bytes;
  do {
    bytes.template Load<kind == Kind::kInt8>(codes.bytes);
    tile.Add(bytes, x, stride);
    codes.bytes += codes.row;
    x += 4;
  } while (--rows > 0);
  tile.AddTo(sums);
}

// Calls run.Go<R>(row) for R rows from `row` on.
template <int Most, class Run>
inline void Go(int64_t rows, int64_t row, const Run& run) {
  if constexpr (Most > 1) {
    if (rows < Most) return Go<Most - 1>(rows, row, run);
  }
  run.template Go<Most>(row);
}

// All rows, at most Most at a time, in tiles that are about alike.
template <int Most, class Run>
inline void InTiles(int64_t count, const Run& run) {
  int64_t row = 0;
  for (int64_t tiles = CeilDiv(count, Most); tiles > 0; --tiles) {
    const int64_t rows = CeilDiv(count - row, tiles);
    Go<Most>(rows, row, run);
    row += rows;
  }
}

// What codes are multiplied from: packed fields, fields in the int8 layout, int8.
enum class From { kPacked, kFields, kInt8 };

template <class I, From from, int P>
struct Run {
  const Rows& x;
  int64_t k;  // the weight to begin at
  Panel codes;
  int64_t rows;
  int32_t* sums;
  template <int R>
  void Go(int64_t m) const {
    const int8_t* at = x.codes + m * x.stride + k;
    if constexpr (from == From::kPacked) {
      Direct<I, R, P>(at, x.stride, codes, rows, sums + m * kWidth);
    } else {
      constexpr Kind kKind = from == From::kInt8 ? Kind::kInt8 : Kind::kTernary;
      Bytes<I, kKind, R, P>(at, x.stride, codes, rows, sums + m * kWidth);
    }
  }
};

// All rows of x, from weight k on, against `rows` byte rows of `panels` panels.
template <class I, From from>
void Add(const Rows& x, int64_t k, Panel codes, int64_t rows, int64_t panels, int32_t* sums) {
  constexpr int kWide = I::kTilePanels;
  if (x.count == 1 && panels == kPanels) {  // a single row leaves registers for all
    return Run<I, from, kPanels>{x, k, codes, rows, sums}.template Go<1>(0);
  }
  int64_t p = 0;
  if constexpr (kWide == 1) {
    for (; x.count == 2 && p + 2 <= panels; p += 2) {  // so do two, for two panels
      Run<I, from, 2>{x, k, codes.Next(p), rows, sums + p * kOutputs}.template Go<2>(0);
    }
  }
  for (; p + kWide <= panels; p += kWide) {
    InTiles<I::kTileRows>(x.count,
                          Run<I, from, kWide>{x, k, codes.Next(p), rows, sums + p * kOutputs});
  }
  if constexpr (kWide > 1) {
    for (; p < panels; ++p) {
      InTiles<I::kTileRows>(x.count,
                            Run<I, from, 1>{x, k, codes.Next(p), rows, sums + p * kOutputs});
    }
  }
}

template <class I>
void Int8Sums(const Rows& x, const Beside& beside, int32_t* sums) {
  const Panel codes = FromRow(beside, beside.fours.first);
  Begin<I, Kind::kInt8>(x, sums);
  const int64_t step = kFields * Now(tuned<I>.step_rows);
  for (int64_t start = 0; start < beside.fours.count; start += step) {
    Add<I, From::kInt8>(x, 4 * start, codes.Down(start), Least(beside.fours.count - start, step),
                        beside.count, sums);
  }
}

// A single row and one field of kPanels panels.
template <class I, int j>
void OneField(const int8_t* x, Panel codes, int64_t rows, int32_t* sums) {
  Tile<I, Kind::kTernary, 1, kPanels> tile;
  Codes<I, kPanels> bytes;
  for (int64_t r = 0; r < rows; ++r, codes.bytes += codes.row, x += 4) {
    bytes.template Load<true>(codes.bytes);
    tile.Add(bytes.template Field<j>(), x, 0);
  }
  tile.AddTo(sums);
}

// A single row and a run of kPanels panels that cuts blocks.
template <class I>
void OneRowOfFields(const Rows& x, const Beside& beside, int32_t* sums) {
  constexpr void (*kField[kFields])(const int8_t*, Panel, int64_t, int32_t*) = {
      OneField<I, 0>, OneField<I, 1>, OneField<I, 2>, OneField<I, 3>};
  const int8_t* at = x.codes;
  for (Fours fours = beside.fours; fours.count > 0;) {
    const Span span(fours, beside.byte_rows);
    if (span.whole) {
      Direct<I, 1, kPanels>(at, 0, FromRow(beside, span.row), span.fours / kFields, sums);
    } else {
      kField[span.field](at, FromRow(beside, span.row), span.fours, sums);
    }
    at += 4 * span.fours;
    fours = {fours.first + span.fours, fours.count - span.fours};
  }
}

// Asks for so many byte rows of all panels at once: between panels that are multiplied one
// after the other, what each asks for by itself comes too late.
inline void Ahead(Panel codes, int64_t rows) {
  for (int64_t byte = 0; byte < rows * codes.row; byte += kRowBytes) {
    __builtin_prefetch(codes.bytes + byte);
  }
}

// Up to so many rows, a step of unpacked codes is multiplied sooner than memory brings the next.
// By count: 64 rows of a step take longer than its 16 KB at 10 GB/s.
constexpr int64_t kSoonDone = 64;

template <class I>
void TernarySums(const Rows& x, const Beside& beside, int32_t* sums) {
  Begin<I, Kind::kTernary>(x, sums);
  const Fours fours = beside.fours;
  if (x.count <= Now(tuned<I>.direct_rows) && IsInBlocks(fours, beside.byte_rows)) {
    const Panel codes = FromRow(beside, fours.first / kFields);
    const int64_t byte_rows = fours.count / kFields;
    if (x.count == 1 && beside.count == kPanels) return I::OneRow(x, codes, byte_rows, sums);
    for (int64_t start = 0; start < byte_rows; start += kBlockRows) {
      Ahead(codes.Down(start + kBlockRows), kBlockRows);
      Add<I, From::kPacked>(x, start * RowDepth(Kind::kTernary), codes.Down(start),
                            Least(byte_rows - start, kBlockRows), beside.count, sums);
    }
    return;
  }
  if (x.count == 1 && beside.count == kPanels) return OneRowOfFields<I>(x, beside, sums);
  Unpacked unpacked;
  const int64_t step = kFields * Least(Now(tuned<I>.step_rows), kUnpackedRows);
  for (int64_t start = 0; start < fours.count; start += step) {
    const int64_t taken = Least(fours.count - start, step);
    if (x.count <= kSoonDone) {
      Ahead(FromRow(beside, CeilDiv(fours.first + start + taken, kFields)), taken / kFields);
    }
    Unpack<I>(beside, {fours.first + start, taken}, unpacked);
    Add<I, From::kFields>(x, 4 * start, unpacked.All(), taken, beside.count, sums);
  }
}

// So many sums that do not wait for each other, in registers all the time.
template <class I, int Count>
struct Independent {
  typename I::template Total<Kind::kTernary> own{};
  Independent<I, Count - 1> rest{};

  BITNET_INLINE void Add(const typename I::Row& codes, typename I::Activations& four) {
    I::Opaque(four);  // so that no product is worked out once for all
    own.Add(codes, four);
    rest.Add(codes, four);
  }
  BITNET_INLINE void AddTo(int32_t* sums) const {
    own.AddTo(sums);
    rest.AddTo(sums);
  }
};

template <class I>
struct Independent<I, 0> {
  BITNET_INLINE void Add(const typename I::Row&, typename I::Activations&) {}
  BITNET_INLINE void AddTo(int32_t*) const {}
};

// Products from registers alone, as many at a time as hide the latency of each.
template <class I>
int64_t Busy(int64_t turns, int32_t* sink) {
  uint8_t zeros[kRowBytes] = {};
  asm volatile("" : : "r"(zeros) : "memory");  // no compiler knows what they are
  const typename I::Row codes = I::Load(zeros);
  typename I::Activations four = I::Every(reinterpret_cast<const int8_t*>(zeros));
  Independent<I, I::kIndependent> totals;
  for (int64_t t = 0; t < turns; ++t) totals.Add(codes, four);
  int32_t sums[kOutputs] = {};
  totals.AddTo(sums);
  for (const int32_t sum : sums) *sink += sum;
  return turns * I::kIndependent * kRowBytes * 2;
}

template <class I>
constexpr Path PathOf(const char* name, bool (*supported)()) {
  return {name,
          supported,
          &tuned<I>,
          I::kMostStepRows,
          TernarySums<I>,
          Int8Sums<I>,
          QuantizeRow<float>,
          QuantizeRow<BFloat16>,
          RotateRow,
          kKernelQuantizer<float>,
          kKernelQuantizer<BFloat16>,
          LayOutInt8,
          LayOutTernaryCodes,
          I::kInt8Alike,
          TotalOf,
          Finish,
          Busy<I>};
}

}  // namespace
}  // namespace bitnet
