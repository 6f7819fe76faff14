// AMX int8: tiles of 16 rows by 64 weights times 64 weights by 16 outputs.
//
// Ternary panels are unpacked to the int8 layout by AVX512, of which any 16 byte rows are
// a tile. Two by two tiles of sums stay in registers. Rows that fill no tile of 16 are
// left to the AVX512 path, which every processor with AMX has.

#include "target.h"

#ifdef BITNET_AMX

#include "cpu_has.h"

// The test driver runs this file where there is no AMX: the same calls on plain arrays.
#ifdef BITNET_TEST_AMX_BY_HAND
BITNET_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "amx_by_hand.h"
#else
#include <sys/syscall.h>
#include <unistd.h>
BITNET_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
#endif

#include "avx512.h"

namespace bitnet {
namespace {

// Its few rows, and what is unpacked for tiles.
struct Amx : Avx512 {
  // 64 KB are unpacked for so many rows, whose own sums are 128 KB. From prototypes on an Intel
  // processor with AMX; neither it nor another has been there to try others.
  static constexpr int64_t kSlab = 512;
};

// Of an instruction. Two by two tiles of sums, two of x and two of codes are all eight there are:
// four loads for four products. On that processor a thread did 7.0 TOP/s from registers, 5.9 with
// these loads, 5.7 with codes unpacked between them.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = kTileRows * 4;  // weights
constexpr int64_t kSumsStride = kWidth * sizeof(int32_t);

// Every tile is 16 rows of 64 bytes: sums in 0 to 3, activations in 4 and 5, codes in 6, 7.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC 12 does not know what memory the tile instructions read: stores before them may be
// left out, or come after.
inline void MemoryIsRead() { asm volatile("" : : : "memory"); }

// Puts back what it found: another library may take its own tiles for still configured.
struct Configured {
  TileConfig ours, before;
  Configured() {
    MemoryIsRead();
    _tile_storeconfig(&before);
    _tile_loadconfig(&ours);
  }
  ~Configured() {
    MemoryIsRead();
    if (before.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before);
    }
  }
};

// 16 * RowTiles rows times 16 * PanelTiles outputs, `rows` byte rows (a multiple of 16).
template <int RowTiles, int PanelTiles>
void Block(const int8_t* x, int64_t stride, Panel codes, int64_t rows, int32_t* sums) {
  MemoryIsRead();
  int32_t* lower = sums + kTileRows * kWidth;
  _tile_loadd(0, sums, kSumsStride);
  if (PanelTiles > 1) _tile_loadd(1, sums + kOutputs, kSumsStride);
  if (RowTiles > 1) _tile_loadd(2, lower, kSumsStride);
  if (RowTiles > 1 && PanelTiles > 1) _tile_loadd(3, lower + kOutputs, kSumsStride);
  for (int64_t r = 0; r < rows; r += kTileRows, x += kTileDepth) {
    _tile_loadd(4, x, stride);
    _tile_loadd(6, codes.bytes + r * codes.row, codes.row);
    _tile_dpbsud(0, 4, 6);
    if (PanelTiles > 1) {
      _tile_loadd(7, codes.bytes + kRowBytes + r * codes.row, codes.row);
      _tile_dpbsud(1, 4, 7);
    }
    if (RowTiles > 1) {
      _tile_loadd(5, x + kTileRows * stride, stride);
      _tile_dpbsud(2, 5, 6);
      if (PanelTiles > 1) _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumsStride);
  if (PanelTiles > 1) _tile_stored(1, sums + kOutputs, kSumsStride);
  if (RowTiles > 1) _tile_stored(2, lower, kSumsStride);
  if (RowTiles > 1 && PanelTiles > 1) _tile_stored(3, lower + kOutputs, kSumsStride);
}

template <int PanelTiles>
void Columns(const Rows& x, int64_t k, Panel codes, int64_t rows, int32_t* sums) {
  int64_t m = 0;
  for (; m + 2 * kTileRows <= x.count; m += 2 * kTileRows) {
    Block<2, PanelTiles>(x.codes + m * x.stride + k, x.stride, codes, rows, sums + m * kWidth);
  }
  for (; m + kTileRows <= x.count; m += kTileRows) {
    Block<1, PanelTiles>(x.codes + m * x.stride + k, x.stride, codes, rows, sums + m * kWidth);
  }
}

// The whole tiles of rows; `rows` byte rows are a multiple of 16.
void AllTiles(const Rows& x, int64_t k, Panel codes, int64_t rows, int64_t panels, int32_t* sums) {
  int64_t p = 0;
  for (; p + 2 <= panels; p += 2) {
    Columns<2>(x, k, codes.Next(p), rows, sums + p * kOutputs);
  }
  if (p < panels) Columns<1>(x, k, codes.Next(p), rows, sums + p * kOutputs);
}

Rows From(const Rows& x, int64_t first) {
  const int32_t* totals = x.totals == nullptr ? nullptr : x.totals + first;
  return {x.codes + first * x.stride, x.stride, x.count - first, totals};
}

void AmxTernary(const Rows& x, const Beside& beside, int32_t* sums) {
  if (x.count < kTileRows) return TernarySums<Amx>(x, beside, sums);
  const int64_t whole = x.count / kTileRows * kTileRows, panels = beside.count;
  const Rows tail = From(x, whole);
  Unpacked unpacked;
  Begin<Avx512, Kind::kTernary>(x, sums);
  const Configured configured;
  const Fours fours = beside.fours;
  constexpr int64_t kStep = kFields * kUnpackedRows;
  for (int64_t start = 0; start < fours.count; start += kStep) {
    const int64_t deep = Least(fours.count - start, kStep);
    const int64_t padded = CeilDiv(deep, kTileRows) * kTileRows;
    Unpack<Avx512>(beside, {fours.first + start, deep}, unpacked);
    // Beyond the run a byte 0 counts for nothing, whatever x holds.
    std::memset(unpacked.bytes + deep * Unpacked::kRow, 0, (padded - deep) * Unpacked::kRow);
    AllTiles(x, 4 * start, unpacked.All(), padded, panels, sums);
    Add<Avx512, From::kFields>(tail, 4 * start, unpacked.All(), deep, panels,
                               sums + whole * kWidth);
  }
}

void AmxInt8(const Rows& x, const Beside& beside, int32_t* sums) {
  if (x.count < kTileRows) return Int8Sums<Amx>(x, beside, sums);
  const int64_t whole = x.count / kTileRows * kTileRows, panels = beside.count;
  const Panel panel = FromRow(beside, beside.fours.first);
  const int64_t byte_rows = beside.fours.count;
  const int64_t in_tiles = byte_rows / kTileRows * kTileRows, left = byte_rows - in_tiles;
  Begin<Avx512, Kind::kInt8>({x.codes, x.stride, whole, x.totals}, sums);
  {
    const Configured configured;
    AllTiles(x, 0, panel, in_tiles, panels, sums);
    if (left > 0) {  // a last tile of the contraction, copied to be whole
      alignas(64) uint8_t last[kTileRows * kPanels * kRowBytes] = {};
      std::memcpy(last, panel.Down(in_tiles).bytes, left * panel.row);
      AllTiles(x, in_tiles * 4, {last, panel.row}, kTileRows, panels, sums);
    }
  }
  Int8Sums<Amx>(From(x, whole), beside, sums + whole * kWidth);
}

int64_t AmxBusy(int64_t turns, int32_t* sink) {
  alignas(64) int32_t tile[kTileRows * kOutputs] = {};
  const Configured configured;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, tile, kRowBytes);
  _tile_loadd(5, tile, kRowBytes);
  _tile_loadd(6, tile, kRowBytes);
  _tile_loadd(7, tile, kRowBytes);
  for (int64_t t = 0; t < turns; ++t) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, tile, kRowBytes);
  *sink += tile[0];
  return turns * 4 * kTileRows * kTileDepth * kOutputs * 2;
}

bool HasAmx() {
#ifdef BITNET_TEST_AMX_BY_HAND
  return __builtin_cpu_supports("avx512vnni");
#else
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni") ||
      !CpuHas(7, 0, kEdx, 24) || !CpuHas(7, 0, kEdx, 25)) {
    return false;
  }
  // The kernel keeps tile registers only for a process that asked for them.
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#endif
}

constexpr Path MakePath() {
  Path path = PathOf<Amx>("amx", HasAmx);
  path.ternary = AmxTernary;
  path.int8 = AmxInt8;
  path.busy = AmxBusy;
  return path;
}

}  // namespace

const Path kAmxPath = MakePath();

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_AMX
