#include "sha256.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "target.h"

namespace bitnet {

const Hasher* const kHashers[] = {
#ifdef BITNET_X86
    &kAvx512Hasher,
    &kShaNiHasher,
    &kAvx2Hasher,
#endif
    nullptr,
};
const int kHasherCount = sizeof(kHashers) / sizeof(kHashers[0]) - 1;

const Hasher* HasherHere(int index) {
  for (int i = 0; i < kHasherCount && index >= 0; ++i) {
    if (kHashers[i]->supported() && index-- == 0) return kHashers[i];
  }
  return nullptr;
}

namespace {

// The square roots of the first eight primes: their first 32 bits behind the point.
constexpr uint32_t kStart[kHashWords] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                                         0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

void WriteBigEndian(uint64_t value, int bytes, uint8_t* to) {
  for (int i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(value >> 8 * (bytes - 1 - i));
}

// A message on its way through one stream: its whole blocks where they are, then the rest of it,
// a one, zeros and its length in bits, in one block or two of its own.
struct Stream {
  int64_t message = -1;  // none
  const uint8_t* at = nullptr;
  int64_t blocks = 0;  // that are left, of the message or of its end
  bool in_end = false;
  uint8_t end[2 * kHashBlock];

  void Begin(int64_t index, const Message& from) {
    message = index;
    at = from.bytes;
    blocks = from.length / kHashBlock;
    in_end = false;
    if (blocks == 0) BeginEnd(from);
  }

  void BeginEnd(const Message& from) {
    const int64_t rest = from.length % kHashBlock;
    std::memset(end, 0, sizeof(end));
    if (rest > 0) std::memcpy(end, from.bytes + from.length - rest, rest);
    end[rest] = 0x80;
    blocks = rest + 9 > kHashBlock ? 2 : 1;
    WriteBigEndian(8 * static_cast<uint64_t>(from.length), 8, end + blocks * kHashBlock - 8);
    at = end;
    in_end = true;
  }
};

bool HasThree(const uint8_t* bytes, int64_t length) {
  uint8_t found = 0;
  for (int64_t i = 0; i < length; ++i) found |= (bytes[i] >> 1) & bytes[i];
  return (found & kLowBits) != 0;
}

}  // namespace

void Sha256(const Hasher& hasher, const Message* messages, int64_t count, uint8_t* digests,
            uint8_t* threes) {
  const int64_t streams = hasher.streams;
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  // The longest first: the last ones are short, and few streams wait for them.
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return messages[a].length > messages[b].length; });
  Stream stream[kMostStreams];
  alignas(64) uint32_t states[kHashWords * kMostStreams] = {};
  int64_t next = 0, busy = 0;
  const auto begin = [&](int64_t s) {
    if (next == count) return false;
    const int64_t message = order[next++];
    stream[s].Begin(message, messages[message]);
    threes[message] = 0;
    for (int64_t w = 0; w < kHashWords; ++w) states[w * streams + s] = kStart[w];
    return true;
  };
  for (int64_t s = 0; s < streams; ++s) busy += begin(s);
  while (busy > 0) {
    const Stream* least = nullptr;
    for (int64_t s = 0; s < streams; ++s) {
      if (stream[s].message < 0) continue;
      if (least == nullptr || stream[s].blocks < least->blocks) least = &stream[s];
    }
    const int64_t run = least->blocks;
    const uint8_t* from[kMostStreams];
    // A stream without a message repeats another one; nobody reads its state.
    for (int64_t s = 0; s < streams; ++s)
      from[s] = stream[s].message < 0 ? least->at : stream[s].at;
    uint32_t found[kMostStreams] = {};
    hasher.compress(from, run, states, found);
    for (int64_t s = 0; s < streams; ++s) {
      Stream& one = stream[s];
      if (one.message < 0) continue;
      const Message& message = messages[one.message];
      if (!one.in_end && found[s] != 0) threes[one.message] = 1;
      one.at += run * kHashBlock;
      one.blocks -= run;
      if (one.blocks > 0) continue;
      if (!one.in_end) {
        one.BeginEnd(message);
        continue;
      }
      for (int64_t w = 0; w < kHashWords; ++w) {
        WriteBigEndian(states[w * streams + s], 4, digests + one.message * kDigestBytes + 4 * w);
      }
      const int64_t rest = message.length % kHashBlock;
      if (rest > 0 && HasThree(message.bytes + message.length - rest, rest)) {
        threes[one.message] = 1;
      }
      one.message = -1;
      busy -= !begin(s);
    }
  }
}

}  // namespace bitnet
