#include "product.h"

#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#define BITNET_X86 1
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own headers
#include <immintrin.h>
#endif

namespace bitnet {
namespace {

void Portable(const int8_t* x, int64_t stride, int64_t rows, const uint8_t* codes, int64_t blocks,
              int64_t panels, int32_t* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t p = 0; p < panels; ++p) {
      int32_t total[kOutputs] = {};
      const uint8_t* byte = codes + p * blocks * kBlockBytes;
      for (int64_t k = 0; k < blocks; ++k) {
        const int8_t* block = x + m * stride + k * kDepth;
        for (int64_t r = 0; r < 16; ++r) {
          for (int64_t l = 0; l < kOutputs; ++l) {
            for (int64_t i = 0; i < 4; ++i, ++byte) {
              for (int64_t j = 0; j < 4; ++j) {
                total[l] += ((*byte >> (2 * j)) & 3) * block[64 * j + 4 * r + i];
              }
            }
          }
        }
      }
      std::memcpy(sums + (m * kPanels + p) * kOutputs, total, sizeof(total));
    }
  }
}

bool Always() { return true; }

#ifdef BITNET_X86

// Four adjacent activations, in every lane.
inline int32_t Four(const int8_t* x) {
  int32_t value;
  std::memcpy(&value, x, sizeof(value));
  return value;
}

#define BITNET_AVX2 __attribute__((target("avx2")))
#define BITNET_VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))

bool HasAvx2() { return __builtin_cpu_supports("avx2"); }

bool HasVnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vnni");
}

// One panel, `Rows` rows. A block's products are summed in int16: 64 pairs of at most
// 2 * 2 * 127 and at least -2 * 2 * 128 stay within it.
template <int Rows>
BITNET_AVX2 void Avx2Panel(const int8_t* x, int64_t stride, const uint8_t* codes, int64_t blocks,
                           int32_t* sums) {
  const __m256i mask = _mm256_set1_epi8(3);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total[Rows][2];
  for (int m = 0; m < Rows; ++m) total[m][0] = total[m][1] = _mm256_setzero_si256();
  for (int64_t k = 0; k < blocks; ++k) {
    __m256i part[Rows][2];
    for (int m = 0; m < Rows; ++m) part[m][0] = part[m][1] = _mm256_setzero_si256();
    for (int r = 0; r < 16; ++r, codes += 64) {
      __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32));
      for (int j = 0; j < 4; ++j) {
        const __m256i first = _mm256_and_si256(low, mask);
        const __m256i second = _mm256_and_si256(high, mask);
        low = _mm256_srli_epi16(low, 2);
        high = _mm256_srli_epi16(high, 2);
        for (int m = 0; m < Rows; ++m) {
          const __m256i four =
              _mm256_set1_epi32(Four(x + m * stride + k * kDepth + 64 * j + 4 * r));
          part[m][0] = _mm256_add_epi16(part[m][0], _mm256_maddubs_epi16(first, four));
          part[m][1] = _mm256_add_epi16(part[m][1], _mm256_maddubs_epi16(second, four));
        }
      }
    }
    for (int m = 0; m < Rows; ++m) {
      for (int h = 0; h < 2; ++h) {
        total[m][h] = _mm256_add_epi32(total[m][h], _mm256_madd_epi16(part[m][h], ones));
      }
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int h = 0; h < 2; ++h) {
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(sums + m * kPanels * kOutputs + 8 * h), total[m][h]);
    }
  }
}

BITNET_AVX2 void Avx2(const int8_t* x, int64_t stride, int64_t rows, const uint8_t* codes,
                      int64_t blocks, int64_t panels, int32_t* sums) {
  for (int64_t p = 0; p < panels; ++p, codes += blocks * kBlockBytes, sums += kOutputs) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) {
      Avx2Panel<4>(x + m * stride, stride, codes, blocks, sums + m * kPanels * kOutputs);
    }
    for (; m < rows; ++m) {
      Avx2Panel<1>(x + m * stride, stride, codes, blocks, sums + m * kPanels * kOutputs);
    }
  }
}

// One row, `Panels` streams. The codes are masked where they stand, so field j counts
// 4^j times; the sums are shifted back at the end.
template <int Panels>
BITNET_VNNI void VnniRow(const int8_t* x, const uint8_t* codes, int64_t blocks, int32_t* sums) {
  constexpr int64_t kAhead = 4096;  // bytes of each stream
  const int64_t panel = blocks * kBlockBytes;
  __m512i total[Panels][4];
  for (int p = 0; p < Panels; ++p) {
    for (int j = 0; j < 4; ++j) total[p][j] = _mm512_setzero_si512();
  }
  const __m512i mask[4] = {_mm512_set1_epi8(3), _mm512_set1_epi8(12), _mm512_set1_epi8(48),
                           _mm512_set1_epi8(static_cast<char>(192))};
  for (int64_t k = 0; k < blocks; ++k, x += kDepth) {
    for (int r = 0; r < 16; ++r, codes += 64) {
      __m512i four[4];
      for (int j = 0; j < 4; ++j) four[j] = _mm512_set1_epi32(Four(x + 64 * j + 4 * r));
      for (int p = 0; p < Panels; ++p) {
        const uint8_t* row = codes + p * panel;
        _mm_prefetch(reinterpret_cast<const char*>(row + kAhead), _MM_HINT_T0);
        const __m512i bytes = _mm512_loadu_si512(row);
        for (int j = 0; j < 4; ++j) {
          total[p][j] =
              _mm512_dpbusd_epi32(total[p][j], _mm512_and_si512(bytes, mask[j]), four[j]);
        }
      }
    }
  }
  for (int p = 0; p < Panels; ++p) {
    __m512i sum = total[p][0];
    for (int j = 1; j < 4; ++j) {
      sum = _mm512_add_epi32(sum, _mm512_srai_epi32(total[p][j], 2 * j));
    }
    _mm512_storeu_si512(sums + p * kOutputs, sum);
  }
}

// `Rows` rows and `Panels` panels: every row of codes is unpacked once for all of them.
template <int Rows, int Panels>
BITNET_VNNI void VnniRows(const int8_t* x, int64_t stride, const uint8_t* codes, int64_t blocks,
                          int32_t* sums) {
  const int64_t panel = blocks * kBlockBytes;
  const __m512i mask = _mm512_set1_epi8(3);
  __m512i total[Rows][Panels];
  for (int m = 0; m < Rows; ++m) {
    for (int p = 0; p < Panels; ++p) total[m][p] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < blocks; ++k, x += kDepth) {
    for (int r = 0; r < 16; ++r, codes += 64) {
      __m512i bytes[Panels];
      for (int p = 0; p < Panels; ++p) bytes[p] = _mm512_loadu_si512(codes + p * panel);
      for (int j = 0; j < 4; ++j) {
        __m512i field[Panels];
        for (int p = 0; p < Panels; ++p) {
          field[p] = _mm512_and_si512(_mm512_srli_epi16(bytes[p], 2 * j), mask);
        }
        for (int m = 0; m < Rows; ++m) {
          const __m512i four = _mm512_set1_epi32(Four(x + m * stride + 64 * j + 4 * r));
          for (int p = 0; p < Panels; ++p) {
            total[m][p] = _mm512_dpbusd_epi32(total[m][p], field[p], four);
          }
        }
      }
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int p = 0; p < Panels; ++p) {
      _mm512_storeu_si512(sums + (m * kPanels + p) * kOutputs, total[m][p]);
    }
  }
}

template <int Panels>
BITNET_VNNI void VnniAllRows(const int8_t* x, int64_t stride, int64_t rows, const uint8_t* codes,
                             int64_t blocks, int32_t* sums) {
  constexpr int64_t kRow = kPanels * kOutputs;
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) {
    VnniRows<8, Panels>(x + m * stride, stride, codes, blocks, sums + m * kRow);
  }
  for (; m + 4 <= rows; m += 4) {
    VnniRows<4, Panels>(x + m * stride, stride, codes, blocks, sums + m * kRow);
  }
  for (; m + 2 <= rows; m += 2) {
    VnniRows<2, Panels>(x + m * stride, stride, codes, blocks, sums + m * kRow);
  }
  for (; m < rows; ++m) VnniRow<Panels>(x + m * stride, codes, blocks, sums + m * kRow);
}

BITNET_VNNI void Vnni(const int8_t* x, int64_t stride, int64_t rows, const uint8_t* codes,
                      int64_t blocks, int64_t panels, int32_t* sums) {
  if (rows == 1 && panels == 4) return VnniRow<4>(x, codes, blocks, sums);
  while (panels > 0) {
    const int64_t taken = panels >= 2 ? 2 : 1;
    if (taken == 2) {
      VnniAllRows<2>(x, stride, rows, codes, blocks, sums);
    } else {
      VnniAllRows<1>(x, stride, rows, codes, blocks, sums);
    }
    codes += taken * blocks * kBlockBytes;
    sums += taken * kOutputs;
    panels -= taken;
  }
}

#endif  // BITNET_X86

}  // namespace

const Path kPaths[] = {
#ifdef BITNET_X86
    {"avx512_vnni", HasVnni, Vnni},
    {"avx2", HasAvx2, Avx2},
#endif
    {"portable", Always, Portable},
};
const int kPathCount = sizeof(kPaths) / sizeof(kPaths[0]);

}  // namespace bitnet
