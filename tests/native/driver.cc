// Runs every path of the native product on buffers of exactly the bytes it may touch, and
// compares it with a plain sum; .ci/slow builds it with AddressSanitizer and UBSan.

#include <cstdio>
#include <random>
#include <vector>

#include "product.h"

int main() {
  std::mt19937 random(0);
  int failures = 0;
  for (int p = 0; p < bitnet::kPathCount; ++p) {
    if (!bitnet::kPaths[p].supported()) continue;
    for (int64_t rows : {1, 2, 3, 7, 8, 9, 64}) {
      for (int64_t blocks : {0, 1, 2, 5}) {
        for (int64_t panels = 1; panels <= bitnet::kPanels; ++panels) {
          const int64_t depth = blocks * bitnet::kDepth;
          std::vector<int8_t> x(rows * depth);
          std::vector<uint8_t> codes(panels * blocks * bitnet::kBlockBytes);
          for (auto& v : x) v = static_cast<int8_t>(random());
          for (auto& c : codes) {
            c = 0;
            for (int j = 0; j < 4; ++j) c |= (random() % 3) << (2 * j);
          }
          const int64_t width = bitnet::kPanels * bitnet::kOutputs;
          // Of the last row only the panels asked for may be written.
          std::vector<int32_t> sums((rows - 1) * width + panels * bitnet::kOutputs);
          bitnet::kPaths[p].product(x.data(), depth, rows, codes.data(), blocks, panels,
                                    sums.data());
          for (int64_t m = 0; m < rows; ++m) {
            for (int64_t n = 0; n < panels * bitnet::kOutputs; ++n) {
              int64_t want = 0;
              for (int64_t k = 0; k < depth; ++k) {
                const int64_t in = k % bitnet::kDepth;
                const int64_t byte = (n / 16 * blocks + k / bitnet::kDepth) * bitnet::kBlockBytes +
                                     in % 64 / 4 * 64 + 4 * (n % 16) + in % 4;
                want += ((codes[byte] >> (2 * (in / 64))) & 3) * x[m * depth + k];
              }
              failures += sums[m * width + n] != want;
            }
          }
        }
      }
    }
    std::printf("%s: done\n", bitnet::kPaths[p].name);
  }
  std::printf("%d sums differ\n", failures);
  return failures != 0;
}
