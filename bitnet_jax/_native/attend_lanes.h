// Vectors of 16 floats as a compiler makes them of any registers. For attend_kernels.h.

using Lanes = float __attribute__((vector_size(64)));
using InMemory = float __attribute__((vector_size(64), aligned(4), may_alias));
using Half8 = float __attribute__((vector_size(32)));
using Half4 = float __attribute__((vector_size(16)));
using Words = int32_t __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;
constexpr int64_t kVectors = 4;  // of a value, at a time

inline Lanes Load(const float* from) { return *reinterpret_cast<const InMemory*>(from); }

inline Lanes Load(const BFloat16* from) {
  Words wide;
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = static_cast<int32_t>(from[i].bits) << 16;
  Lanes result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

// The halves of a vector, added until one lane is left.
inline float Total(Lanes x) {
  Half8 eights[2];
  std::memcpy(eights, &x, sizeof(x));
  eights[0] += eights[1];
  Half4 fours[2];
  std::memcpy(fours, eights, sizeof(eights[0]));
  const Half4 four = fours[0] + fours[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

inline Lanes AtLeast(Lanes x, float least) { return x < least ? Lanes{} + least : x; }

// `value`, but 0 where x is `what`.
inline Lanes ZeroWhere(Lanes x, float what, Lanes value) { return x == what ? Lanes{} : value; }

// x times 2 to the power of what the bits of `power` are above `zero`.
inline Lanes TimesPower(Lanes x, Lanes power, int32_t zero) {
  Words bits, shift;
  std::memcpy(&bits, &x, sizeof(bits));
  std::memcpy(&shift, &power, sizeof(shift));
  bits += (shift - zero) << 23;
  Lanes result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
