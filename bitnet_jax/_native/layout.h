// How a prepared kernel lies in memory, and the sizes that follow from it.
//
// A kernel (K, N) lies in panels of 16 outputs, and each panel in byte rows of 64 bytes:
// bytes 4 l to 4 l + 3 of a row belong to output l, so that a row, unpacked, is the
// operand of a dot product of fours of bytes: 16 outputs, four adjacent weights of each,
// against the same four adjacent activations.
//
// Int8: a row is four weights deep. Byte 4 l + i of row q of a panel:
//
//   code + 128 of weight 4 q + i of output l
//
// Ternary: a row is sixteen weights deep. Sixteen rows make a block of 256 weights, the
// last block may have fewer. Byte 4 l + i of row r of a block of R rows that starts at
// weight k, bits 2j and 2j + 1:
//
//   code + 1 of weight k + 4 R j + 4 r + i of output l
//
// So field j of the R rows of a block is R rows of the int8 layout, one after another.
//
// Four panels (fewer at the end of a kernel) lie side by side, row for row, so that a
// product over a kernel reads it from its first byte to its last:
//
//   row 0 of panels 0 1 2 3, row 1 of panels 0 1 2 3, ..., row 0 of panels 4 5 6 7, ...
//
// Byte rows of an int8 panel, and the rows that the fields of a ternary one unpack to, are
// fours of weights. A run of whole fours is multiplied on its own where activations have
// groups that the kernel does not have.
//
// Ternary is padded with fields 0, which count for nothing whatever x holds there, and
// int8 with bytes 128, which are code 0 against the zeros that x is padded with.

#pragma once

#include <cstdint>

namespace bitnet {

enum class Kind { kTernary, kInt8 };

constexpr int64_t kOutputs = 16;    // of a panel
constexpr int64_t kRowBytes = 64;   // of a byte row
constexpr int64_t kPanels = 4;      // side by side
constexpr int64_t kBlockRows = 16;  // byte rows of a whole ternary block
constexpr int64_t kFields = 4;      // two-bit fields of a byte
// Rows of activations are readable up to a multiple of it: the depth of a tile.
constexpr int64_t kPadding = 64;

// A run of fours of weights, in the order of the contraction.
struct Fours {
  int64_t first, count;
};

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Weights along the contraction that one byte row of a panel holds.
constexpr int64_t RowDepth(Kind kind) { return kind == Kind::kTernary ? 16 : 4; }

// All fours of so many byte rows, and whether a run of a ternary panel is byte rows in whole
// blocks.
constexpr Fours AllOf(Kind kind, int64_t byte_rows) { return {0, byte_rows * RowDepth(kind) / 4}; }

constexpr bool IsInBlocks(Fours fours, int64_t byte_rows) {
  constexpr int64_t kBlock = kBlockRows * kFields;
  const int64_t end = fours.first + fours.count;
  return fours.first % kBlock == 0 && (end % kBlock == 0 || end == byte_rows * kFields);
}

constexpr int64_t ByteRows(Kind kind, int64_t depth) { return CeilDiv(depth, RowDepth(kind)); }

// Bytes from the start of a kernel to row 0 of a panel, and from one row of it to the next.
struct PanelAt {
  int64_t start, row;
};

constexpr PanelAt FindPanel(int64_t panel, int64_t panels, int64_t byte_rows) {
  const int64_t first = panel / kPanels * kPanels;
  const int64_t beside = panels - first < kPanels ? panels - first : kPanels;
  return {(first * byte_rows + panel - first) * kRowBytes, beside * kRowBytes};
}

constexpr int64_t Panels(int64_t outputs) { return CeilDiv(outputs, kOutputs); }

// One panel from a stored ternary kernel: four codes to a byte along the contraction,
// (rows, outputs). Every `last` weights start on a byte of their own; `depth` is the length
// of a group.
void LayOutTernary(const uint8_t* stored, int64_t outputs, int64_t last, int64_t depth,
                   int64_t group, int64_t panel, uint8_t* to, int64_t to_row);

// Stored int8 codes, (depth, outputs) or transposed: one of the strides is 1.
struct Strides {
  int64_t weight, output;
};

}  // namespace bitnet
