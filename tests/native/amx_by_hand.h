// AMX's tiles on plain arrays, for machines without them: the calls that amx.cc makes,
// after Intel's description of each instruction. Tiles of 16 rows of 64 bytes only.

#pragma once

#include <cstdint>
#include <cstring>

namespace by_hand {

inline thread_local bool configured = false;
inline thread_local uint8_t bytes[64];
inline thread_local uint8_t tiles[8][16][64];

inline void LoadConfig(const void* config) {
  std::memcpy(bytes, config, sizeof(bytes));
  bool whole = bytes[0] == 1;  // palette 1; 16 rows of 64 bytes each
  for (int t = 0; t < 8; ++t) {
    whole = whole && bytes[16 + 2 * t] == 64 && bytes[17 + 2 * t] == 0 && bytes[48 + t] == 16;
  }
  if (!whole) __builtin_trap();
  configured = true;
}

inline void Release() {
  configured = false;
  std::memset(bytes, 0, sizeof(bytes));
}

inline void Zero(int t) {
  if (!configured) __builtin_trap();
  std::memset(tiles[t], 0, sizeof(tiles[t]));
}

inline void Load(int t, const void* from, int64_t stride) {
  if (!configured) __builtin_trap();
  for (int r = 0; r < 16; ++r) {
    std::memcpy(tiles[t][r], static_cast<const char*>(from) + r * stride, 64);
  }
}

inline void Store(int t, void* to, int64_t stride) {
  if (!configured) __builtin_trap();
  for (int r = 0; r < 16; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[t][r], 64);
  }
}

// Signed bytes of `a` times unsigned bytes of `b`, onto int32 of `sum`.
inline void DotSignedUnsigned(int sum, int a, int b) {
  if (!configured) __builtin_trap();
  for (int m = 0; m < 16; ++m) {
    uint32_t row[16];
    std::memcpy(row, tiles[sum][m], sizeof(row));
    for (int q = 0; q < 16; ++q) {
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 4; ++i) {
          const int32_t product =
              static_cast<int8_t>(tiles[a][m][4 * q + i]) * tiles[b][q][4 * n + i];
          row[n] += static_cast<uint32_t>(product);
        }
      }
    }
    std::memcpy(tiles[sum][m], row, sizeof(row));
  }
}

}  // namespace by_hand

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#define _tile_loadconfig(config) by_hand::LoadConfig(config)
#define _tile_storeconfig(config) std::memcpy(config, by_hand::bytes, 64)
#define _tile_release() by_hand::Release()
#define _tile_zero(t) by_hand::Zero(t)
#define _tile_loadd(t, from, stride) by_hand::Load(t, from, stride)
#define _tile_stored(t, to, stride) by_hand::Store(t, to, stride)
#define _tile_dpbsud(sum, a, b) by_hand::DotSignedUnsigned(sum, a, b)
