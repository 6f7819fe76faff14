#include "target.h"

#ifdef BITNET_X86

BITNET_TARGET("avx512f,avx512bw")

#include "sha256_lanes.h"

namespace bitnet {
namespace {

struct Avx512Lanes {
  using V = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int64_t kAhead = 1024;

  static V Get(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static void Put(uint32_t* to, V v) { _mm512_storeu_si512(to, v); }
  static V Every(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static V Add(V a, V b) { return _mm512_add_epi32(a, b); }
  static V Subtract(V a, V b) { return _mm512_sub_epi32(a, b); }
  template <int n>
  static V Right(V v) {
    return _mm512_srli_epi32(v, n);
  }
  template <int n>
  static V Rotate(V v) {
    return _mm512_ror_epi32(v, n);
  }
  static V Xor(V a, V b, V c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static V Choose(V e, V f, V g) { return _mm512_ternarylogic_epi32(e, f, g, 0xCA); }
  static V Majority(V a, V b, V c) { return _mm512_ternarylogic_epi32(a, b, c, 0xE8); }
  static V Threes(V found, V v) {  // found | (v >> 1 & v)
    return _mm512_ternarylogic_epi32(found, _mm512_srli_epi32(v, 1), v, 0xF8);
  }
  static V Threes(V found) { return _mm512_and_si512(found, Every(kLowBits)); }
  static V Swap(V v) {
    return _mm512_shuffle_epi8(v,
                               _mm512_set4_epi32(0x0C0D0E0F, 0x08090A0B, 0x04050607, 0x00010203));
  }

  // The processor does not follow 16 streams by itself.
  static void Load(const uint8_t* const* from, int64_t block, V (&w)[16]) {
    V t[16];
    for (int i = 0; i < 16; ++i) {
      const uint8_t* at = from[i] + block * kHashBlock;
      _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
      w[i] = _mm512_loadu_si512(at);
    }
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      w[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      w[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      w[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      w[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Now quarter q of w[4 g + i] has word 4 q + i of messages 4 g to 4 g + 3.
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xDD);
      t[i + 8] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
      w[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      w[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      w[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
      w[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
  }
};

bool HasAvx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }

}  // namespace

const Hasher kAvx512Hasher = {"avx512", HasAvx512, Avx512Lanes::kLanes,
                              Lanes<Avx512Lanes>::Compress};

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_X86
