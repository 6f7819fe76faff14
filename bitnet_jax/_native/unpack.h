// Where panels lie in memory, and a run of their fours of weights unpacked to the int8 layout
// by an instruction set `I`, see kernels.h.

#pragma once

#include "path.h"

namespace bitnet {
namespace {

constexpr int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

// Panels side by side in memory, and the way from one byte row of them to the next.
struct Panel {
  const uint8_t* bytes;
  int64_t row;

  Panel Next(int64_t panels) const { return {bytes + panels * kRowBytes, row}; }
  Panel Down(int64_t rows) const { return {bytes + rows * row, row}; }
};

// The panels from byte row `row` on.
inline Panel FromRow(const Beside& codes, int64_t row) {
  return Panel{codes.panels, codes.count * kRowBytes}.Down(row);
}

// Byte rows of a ternary panel, a multiple of a block, that are unpacked at a time: by count, 64 KB
// for kPanels, which stay in any second-level cache beside 32 KB of sums.
constexpr int64_t kUnpackedRows = 64;

// Unpacked panels side by side, so that a tile reads on through memory.
struct alignas(64) Unpacked {
  static constexpr int64_t kRow = kPanels * kRowBytes;
  uint8_t bytes[kUnpackedRows * kFields * kRow];

  Panel All() const { return {bytes, kRow}; }
};

// All fields of `rows` byte rows of one panel.
template <class I>
void UnpackRows(Panel codes, int64_t rows, uint8_t* to) {
  const int64_t field = rows * Unpacked::kRow;
  for (int64_t r = 0; r < rows; ++r, codes.bytes += codes.row, to += Unpacked::kRow) {
    const typename I::Row bytes = I::Load(codes.bytes);
    I::Write(to, I::template Field<0>(bytes));
    I::Write(to + field, I::template Field<1>(bytes));
    I::Write(to + 2 * field, I::template Field<2>(bytes));
    I::Write(to + 3 * field, I::template Field<3>(bytes));
  }
}

template <class I, int j>
void UnpackField(Panel codes, int64_t rows, uint8_t* to) {
  for (int64_t r = 0; r < rows; ++r, codes.bytes += codes.row, to += Unpacked::kRow) {
    I::Write(to, I::template Field<j>(I::Load(codes.bytes)));
  }
}

// Where a run of ternary fours begins: fours of one field, or all of a block.
struct Span {
  int64_t row, field, fours;
  bool whole;

  Span(Fours run, int64_t byte_rows) {
    const int64_t block = run.first / (kFields * kBlockRows) * kBlockRows;
    const int64_t rows = Least(byte_rows - block, kBlockRows);
    const int64_t inside = run.first - kFields * block;
    row = block + inside % rows;
    field = inside / rows;
    whole = inside == 0 && run.count >= kFields * rows;
    fours = whole ? kFields * rows : Least(run.count, rows - inside % rows);
  }
};

// At most kFields * kUnpackedRows fours of each panel, without the bias of int8.
template <class I>
void Unpack(const Beside& beside, Fours fours, Unpacked& to) {
  constexpr void (*kField[kFields])(Panel, int64_t, uint8_t*) = {
      UnpackField<I, 0>, UnpackField<I, 1>, UnpackField<I, 2>, UnpackField<I, 3>};
  uint8_t* at = to.bytes;
  while (fours.count > 0) {
    const Span span(fours, beside.byte_rows);
    for (int64_t p = 0; p < beside.count; ++p) {
      const Panel codes = FromRow(beside, span.row).Next(p);
      if (span.whole) {
        UnpackRows<I>(codes, span.fours / kFields, at + p * kRowBytes);
      } else {
        kField[span.field](codes, span.fours, at + p * kRowBytes);
      }
    }
    at += span.fours * Unpacked::kRow;
    fours = {fours.first + span.fours, fours.count - span.fours};
  }
}

}  // namespace
}  // namespace bitnet
