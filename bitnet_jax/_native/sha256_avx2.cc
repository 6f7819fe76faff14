#include "target.h"

#ifdef BITNET_X86

BITNET_TARGET("avx2")

#include "sha256_lanes.h"

namespace bitnet {
namespace {

struct Avx2Lanes {
  using V = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int64_t kAhead = 1024;

  static V Get(const uint32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void Put(uint32_t* to, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
  static V Every(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static V Add(V a, V b) { return _mm256_add_epi32(a, b); }
  static V Subtract(V a, V b) { return _mm256_sub_epi32(a, b); }
  template <int n>
  static V Right(V v) {
    return _mm256_srli_epi32(v, n);
  }
  template <int n>
  static V Rotate(V v) {
    return _mm256_or_si256(_mm256_srli_epi32(v, n), _mm256_slli_epi32(v, 32 - n));
  }
  static V Xor(V a, V b, V c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static V Choose(V e, V f, V g) {
    return _mm256_xor_si256(g, _mm256_and_si256(e, _mm256_xor_si256(f, g)));
  }
  static V Majority(V a, V b, V c) {
    return _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, _mm256_or_si256(a, b)));
  }
  static V Threes(V found, V v) {
    return _mm256_or_si256(found, _mm256_and_si256(_mm256_srli_epi32(v, 1), v));
  }
  static V Threes(V found) { return _mm256_and_si256(found, Every(kLowBits)); }
  static V Swap(V v) {
    return _mm256_shuffle_epi8(v, _mm256_set_epi32(0x0C0D0E0F, 0x08090A0B, 0x04050607, 0x00010203,
                                                   0x0C0D0E0F, 0x08090A0B, 0x04050607, 0x00010203));
  }

  static void Load(const uint8_t* const* from, int64_t block, V (&w)[16]) {
    for (int half = 0; half < 2; ++half) {
      V r[8], t[8];
      for (int i = 0; i < 8; ++i) {
        const uint8_t* at = from[i] + block * kHashBlock + 32 * half;
        if (half == 0) _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        r[i] = Get(reinterpret_cast<const uint32_t*>(at));
      }
      for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
      }
      // Now half q of r[4 g + i] has word 4 q + i of messages 4 g to 4 g + 3.
      for (int i = 0; i < 4; ++i) {
        w[8 * half + i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        w[8 * half + i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
      }
    }
  }
};

bool HasAvx2() { return __builtin_cpu_supports("avx2"); }

}  // namespace

const Hasher kAvx2Hasher = {"avx2", HasAvx2, Avx2Lanes::kLanes, Lanes<Avx2Lanes>::Compress};

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_X86
