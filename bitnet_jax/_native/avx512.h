// AVX512-VNNI: a byte row is one vector. Included under its own target by avx512.cc, and
// by amx.cc, which takes its rows that fill no tile.

#pragma once

#include "kernels.h"

namespace bitnet {
namespace {

struct Avx512 {
  using Row = __m512i;
  using Activations = __m512i;
  // 24 sums, 4 vectors of codes and one of x in 32 registers. 128 rows of int8, one thread: 8.6 ms,
  // as with 4 by 4; 6 by 2 takes 9.2.
  static constexpr int kTileRows = 6, kTilePanels = 4;
  static constexpr bool kInt8Alike = true;
  static constexpr int kIndependent = 12;  // two units times a latency of four or five, and some
  // 4 rows .20 ms, unpacked .45; 8 rows .32 against .60; 16 rows .65 against .91. At 32 and 64 the
  // two are as fast within noise.
  static constexpr int64_t kDirectRows = 32;
  // 512 rows: slabs of 64 to 512 take 36 to 40 ms, within noise.
  static constexpr int64_t kSlab = 128;
  // A tile takes all panels, so that no codes are read twice. 64 rows: 4.9 ms, in steps of 16, 32
  // and 64 5.3, 4.7 and 4.6, within noise.
  static constexpr int64_t kMostStepRows = kWhole, kStepRows = kWhole;
  static constexpr uint32_t kBias[2] = {1, 128};

  static Row Load(const uint8_t* row) { return _mm512_loadu_si512(row); }
  static void Write(uint8_t* row, Row v) { _mm512_storeu_si512(row, v); }
  static Activations Every(const int8_t* x) { return _mm512_set1_epi32(Four(x)); }
  template <int j>
  static Row Field(Row bytes) {
    return _mm512_and_si512(_mm512_srli_epi16(bytes, 2 * j), _mm512_set1_epi8(3));
  }
  static void Prefetch(const uint8_t* row) {
    _mm_prefetch(reinterpret_cast<const char*>(row + kAhead), _MM_HINT_T0);
  }
  static void Opaque(Activations& x) { asm volatile("" : "+v"(x)); }

  // Sums as int32 from end to end: where __m512i, which is int64, goes round a loop, GCC 12
  // copies every sum twice a turn.
  using Int32s = int32_t __attribute__((vector_size(64)));

  template <Kind>
  struct Total {
    Int32s sums;
    void Add(Row codes, Activations x) {
      sums =
          reinterpret_cast<Int32s>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, x));
    }
    void AddTo(int32_t* to) const {
      const __m512i there = _mm512_loadu_si512(to);
      _mm512_storeu_si512(to, _mm512_add_epi32(there, reinterpret_cast<__m512i>(sums)));
    }
  };

  // Four panels. The codes are masked where they stand, so field j counts 4^j times, and
  // the sums are shifted back before they could overflow.
  static void OneRow(const Rows& x, Panel codes, int64_t byte_rows, int32_t* sums);

 private:
  // One row, one thread: .10 ms; without .13, 2048 .12, 8192 .087. Tuned on a processor with AMX.
  static constexpr int64_t kAhead = 4096;
};

void Avx512::OneRow(const Rows& rows_of_x, Panel panel, int64_t byte_rows, int32_t* sums) {
  const int8_t* x = rows_of_x.codes;
  const uint8_t* codes = panel.bytes;
  // 4 * 64 * 2 * 127 a byte row at most: half of 2^31 after so many.
  constexpr int64_t kWidthBytes = kPanels * kRowBytes;
  constexpr int64_t kFold = int64_t{1} << 14;
  const Row mask[kFields] = {_mm512_set1_epi8(3), _mm512_set1_epi8(12), _mm512_set1_epi8(48),
                             _mm512_set1_epi8(static_cast<char>(192))};
  for (int64_t begin = 0; begin < byte_rows; begin += kFold) {
    const int64_t end = byte_rows < begin + kFold ? byte_rows : begin + kFold;
    __m512i total[kPanels][kFields];
    for (int p = 0; p < kPanels; ++p) {
      for (int j = 0; j < kFields; ++j) total[p][j] = _mm512_setzero_si512();
    }
    for (int64_t start = begin; start < end; start += kBlockRows) {
      const int64_t rows = end - start < kBlockRows ? end - start : kBlockRows;
      const int64_t field_depth = 4 * rows;
      for (int64_t r = 0; r < rows; ++r, codes += kWidthBytes) {
        Activations four[kFields];
        for (int j = 0; j < kFields; ++j) four[j] = Every(x + field_depth * j + 4 * r);
        for (int p = 0; p < kPanels; ++p) {
          const uint8_t* row = codes + p * kRowBytes;
          Prefetch(row);
          const Row bytes = _mm512_loadu_si512(row);
          for (int j = 0; j < kFields; ++j) {
            const Row field = _mm512_and_si512(bytes, mask[j]);
            total[p][j] = _mm512_dpbusd_epi32(total[p][j], field, four[j]);
          }
        }
      }
      x += 4 * field_depth;
    }
    for (int p = 0; p < kPanels; ++p) {
      __m512i whole = total[p][0];
      for (int j = 1; j < kFields; ++j) {
        whole = _mm512_add_epi32(whole, _mm512_srai_epi32(total[p][j], 2 * j));
      }
      Total<Kind::kTernary>{reinterpret_cast<Int32s>(whole)}.AddTo(sums + p * kOutputs);
    }
  }
}

}  // namespace
}  // namespace bitnet
