// SHA-256 with a message in each 32-bit lane of a vector, written once over an instruction set
// `I`. Included under its own target by sha256_avx512.cc and sha256_avx2.cc:
//
//   I::V, kLanes
//   I::Load(from, block, words)   words[w]: word w of that block of each message, as stored
//   I::Swap(v)                    each word with its bytes in the other order
//   I::Get, Put, Add, Subtract, Every(x), Right<n> (a shift), Rotate<n> (to the right)
//   I::Xor(a, b, c), Choose(e, f, g), Majority(a, b, c), Threes(found, v)

#pragma once

#include <utility>

#include "sha256.h"
#include "target.h"

namespace bitnet {
namespace {

template <class I>
struct Lanes {
  using V = typename I::V;

  // The sums are in the order in which their terms are there, so a round waits for three
  // operations of the one before, on e as on a.
  template <int r>
  static BITNET_INLINE void Round(V (&s)[8], const V& word, uint32_t constant) {
    V &a = s[-r & 7], &b = s[(1 - r) & 7], &c = s[(2 - r) & 7], &d = s[(3 - r) & 7];
    V &e = s[(4 - r) & 7], &f = s[(5 - r) & 7], &g = s[(6 - r) & 7], &h = s[(7 - r) & 7];
    const V known = I::Add(I::Add(h, I::Every(constant)), word);
    const V turned_e =
        I::Xor(I::template Rotate<6>(e), I::template Rotate<11>(e), I::template Rotate<25>(e));
    const V turned_a =
        I::Xor(I::template Rotate<2>(a), I::template Rotate<13>(a), I::template Rotate<22>(a));
    const V most = I::Majority(a, b, c);
    const V next = I::Add(I::Add(I::Add(d, known), I::Choose(e, f, g)), turned_e);
    h = I::Add(I::Add(I::Subtract(next, d), most), turned_a);
    d = next;
  }

  // The word of 16 rounds later, in the place of that of round r.
  template <int r>
  static BITNET_INLINE void Schedule(V (&w)[16]) {
    const V early = w[(r + 1) & 15], late = w[(r + 14) & 15];
    const V turned_early = I::Xor(I::template Rotate<7>(early), I::template Rotate<18>(early),
                                  I::template Right<3>(early));
    const V turned_late = I::Xor(I::template Rotate<17>(late), I::template Rotate<19>(late),
                                 I::template Right<10>(late));
    w[r] = I::Add(I::Add(w[r], w[(r + 9) & 15]), I::Add(turned_early, turned_late));
  }

  template <bool schedule, int r>
  static BITNET_INLINE void Step(V (&s)[8], V (&w)[16], const uint32_t* constants) {
    Round<r>(s, w[r], constants[r]);
    if constexpr (schedule) Schedule<r>(w);
  }

  template <bool schedule, int... r>
  static BITNET_INLINE void Sixteen(V (&s)[8], V (&w)[16], const uint32_t* constants,
                                    std::integer_sequence<int, r...>) {
    (Step<schedule, r>(s, w, constants), ...);
  }

  static void Compress(const uint8_t* const* from, int64_t blocks, uint32_t* states,
                       uint32_t* threes) {
    constexpr std::make_integer_sequence<int, 16> all{};
    V state[8], found = I::Get(threes);
    for (int i = 0; i < 8; ++i) state[i] = I::Get(states + i * I::kLanes);
    for (int64_t block = 0; block < blocks; ++block) {
      V w[16], s[8];
      I::Load(from, block, w);
      for (int i = 0; i < 16; ++i) {
        found = I::Threes(found, w[i]);
        w[i] = I::Swap(w[i]);
      }
      for (int i = 0; i < 8; ++i) s[i] = state[i];
      for (int r = 0; r < 48; r += 16) Sixteen<true>(s, w, kHashConstants + r, all);
      Sixteen<false>(s, w, kHashConstants + 48, all);
      for (int i = 0; i < 8; ++i) state[i] = I::Add(state[i], s[i]);
    }
    I::Put(threes, I::Threes(found));
    for (int i = 0; i < 8; ++i) I::Put(states + i * I::kLanes, state[i]);
  }
};

}  // namespace
}  // namespace bitnet
