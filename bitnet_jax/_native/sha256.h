// SHA-256 (FIPS 180-4) of many messages side by side. One message is a chain of operations
// that each wait for the last one; several of them fill a processor. A hasher is what an
// instruction set has to offer, and its streams are the messages that it takes at once.

#pragma once

#include <cstdint>

namespace bitnet {

constexpr int64_t kHashBlock = 64, kHashWords = 8, kDigestBytes = 4 * kHashWords;
constexpr int64_t kMostStreams = 16;

// The low bit of each two-bit field of a word: it is set in (word >> 1) & word where the field is
// 3, which no stored code is.
constexpr uint32_t kLowBits = 0x55555555;

// The cube roots of the first 64 primes: their first 32 bits behind the point.
constexpr uint32_t kHashConstants[64] = {
    0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5,
    0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174,
    0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA, 0x5CB0A9DC, 0x76F988DA,
    0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967,
    0x27B70A85, 0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85,
    0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070,
    0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
    0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2,
};

struct Hasher {
  const char* name;
  bool (*supported)();
  int64_t streams;
  // Takes `blocks` blocks of each stream, from[stream], into its state: word w is
  // states[w * streams + stream]. Sets bits of threes[stream] where a field of those blocks is 3.
  void (*compress)(const uint8_t* const* from, int64_t blocks, uint32_t* states, uint32_t* threes);
};

extern const Hasher kAvx512Hasher, kShaNiHasher, kAvx2Hasher;

// Fastest first. None where a single message is hashed as fast as these would hash several.
extern const Hasher* const kHashers[];
extern const int kHasherCount;

// One of those that this processor runs; null after the last.
const Hasher* HasherHere(int index);

struct Message {
  const uint8_t* bytes;
  int64_t length;
};

// digests (count, 32): the SHA-256 of each message. threes (count): 1 where one of its two-bit
// fields is 3, else 0.
void Sha256(const Hasher& hasher, const Message* messages, int64_t count, uint8_t* digests,
            uint8_t* threes);

}  // namespace bitnet
