// The product of int8 activations with two-bit codes, summed in int32.
//
// Codes of a kernel (K, N), each stored as code + 1, lie in panels of 16 outputs and
// blocks of 256 weights along the contraction, 1024 bytes a block:
//
//   u8[ceil(N / 16)][ceil(K / 256)][16][64]
//   byte (n, k, r, 4 l + i), bits 2j and 2j + 1:
//     code + 1 of weight 256 k + 64 j + 4 r + i of output 16 n + l
//
// So a row of 64 bytes, masked for one j, is the operand of a dot product of fours of
// bytes: 16 outputs, four weights of each, against four adjacent activations.

#pragma once

#include <cstdint>

namespace bitnet {

constexpr int64_t kOutputs = 16;
constexpr int64_t kDepth = 256;
constexpr int64_t kBlockBytes = kOutputs * kDepth / 4;
// Panels that one call may take: streams that are read side by side.
constexpr int64_t kPanels = 4;
// Above it a sum of 64 * 2 * 128 a block, shifted left by six, might leave int32.
constexpr int64_t kMostDepth = int64_t{1} << 18;

// Sums of activations times (code + 1) for `rows` rows and `panels` <= kPanels panels.
// x: rows of `stride` bytes, at least 256 * blocks of them readable.
// sums: rows of 16 * kPanels int32, of which 16 * panels are written.
using Product = void (*)(const int8_t* x, int64_t stride, int64_t rows, const uint8_t* codes,
                         int64_t blocks, int64_t panels, int32_t* sums);

struct Path {
  const char* name;
  bool (*supported)();
  Product product;
};

// Fastest first; the last one runs everywhere.
extern const Path kPaths[];
extern const int kPathCount;

}  // namespace bitnet
