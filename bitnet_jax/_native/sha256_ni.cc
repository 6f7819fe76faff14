// The instructions for SHA-256 take one message; each waits for the one before. Two messages
// by turns take hardly longer than one.

#include "target.h"

#ifdef BITNET_X86

#include "cpu_has.h"

BITNET_TARGET("sse4.1,ssse3,sha")

#include <utility>

#include "sha256.h"

namespace bitnet {
namespace {

constexpr int kStreams = 2;

// Words a, b, e, f and c, d, g, h, from the highest: as the instructions take them.
struct State {
  __m128i abef, cdgh;
};

struct One {
  State state;
  __m128i w[4], found;
};

inline __m128i Load(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

State Get(const uint32_t* states, int s) {
  const auto word = [&](int w) { return static_cast<int>(states[w * kStreams + s]); };
  return {_mm_set_epi32(word(0), word(1), word(4), word(5)),
          _mm_set_epi32(word(2), word(3), word(6), word(7))};
}

void Put(const State& state, uint32_t* states, int s) {
  constexpr int abef[4] = {5, 4, 1, 0}, cdgh[4] = {7, 6, 3, 2};
  uint32_t words[4];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), state.abef);
  for (int i = 0; i < 4; ++i) states[abef[i] * kStreams + s] = words[i];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), state.cdgh);
  for (int i = 0; i < 4; ++i) states[cdgh[i] * kStreams + s] = words[i];
}

// Four rounds, the q-th, and the four words that are q + 4's.
template <int q>
BITNET_INLINE void Four(One& one) {
  __m128i(&w)[4] = one.w;
  const __m128i known = _mm_add_epi32(w[q & 3], Load(kHashConstants + 4 * q));
  one.state.cdgh = _mm_sha256rnds2_epu32(one.state.cdgh, one.state.abef, known);
  const __m128i high = _mm_shuffle_epi32(known, 0x0E);
  one.state.abef = _mm_sha256rnds2_epu32(one.state.abef, one.state.cdgh, high);
  if constexpr (q < 12) {
    const __m128i last = w[(q + 3) & 3];
    const __m128i seven_back = _mm_alignr_epi8(last, w[(q + 2) & 3], 4);
    __m128i next = _mm_sha256msg1_epu32(w[q & 3], w[(q + 1) & 3]);
    next = _mm_add_epi32(next, seven_back);
    w[q & 3] = _mm_sha256msg2_epu32(next, last);
  }
}

template <int... q>
BITNET_INLINE void All(One& a, One& b, std::integer_sequence<int, q...>) {
  ((Four<q>(a), Four<q>(b)), ...);
}

BITNET_INLINE void Begin(One& one, const uint8_t* from) {
  const __m128i swap = _mm_set_epi32(0x0C0D0E0F, 0x08090A0B, 0x04050607, 0x00010203);
  for (int i = 0; i < 4; ++i) {
    const __m128i stored = Load(from + 16 * i);
    one.found = _mm_or_si128(one.found, _mm_and_si128(_mm_srli_epi32(stored, 1), stored));
    one.w[i] = _mm_shuffle_epi8(stored, swap);
  }
}

BITNET_INLINE void Add(One& one, const State& before) {
  one.state.abef = _mm_add_epi32(one.state.abef, before.abef);
  one.state.cdgh = _mm_add_epi32(one.state.cdgh, before.cdgh);
}

uint32_t AnyThree(__m128i found) {
  return !_mm_testz_si128(found, _mm_set1_epi32(static_cast<int>(kLowBits)));
}

void Compress(const uint8_t* const* from, int64_t blocks, uint32_t* states, uint32_t* threes) {
  One a{Get(states, 0), {}, _mm_setzero_si128()}, b{Get(states, 1), {}, _mm_setzero_si128()};
  for (int64_t block = 0; block < blocks; ++block) {
    const State before_a = a.state, before_b = b.state;
    Begin(a, from[0] + block * kHashBlock);
    Begin(b, from[1] + block * kHashBlock);
    All(a, b, std::make_integer_sequence<int, 16>{});
    Add(a, before_a);
    Add(b, before_b);
  }
  Put(a.state, states, 0);
  Put(b.state, states, 1);
  threes[0] |= AnyThree(a.found);
  threes[1] |= AnyThree(b.found);
}

bool HasSha() {
  return __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("ssse3") &&
         CpuHas(7, 0, kEbx, 29);
}

}  // namespace

const Hasher kShaNiHasher = {"sha_ni", HasSha, kStreams, Compress};

}  // namespace bitnet

BITNET_TARGET_END

#endif  // BITNET_X86
