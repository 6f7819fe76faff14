// Vectors of 16 floats as a compiler makes them of any registers. For attend_kernels.h.

using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
using Half8 = float __attribute__((vector_size(32)));
using Half4 = float __attribute__((vector_size(16)));
using Words = int32_t __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;
constexpr int64_t kVectors = 4;  // of a value, at a time

inline Lanes Load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }

inline Lanes Load(const BFloat16* from) {
  Words wide;
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = static_cast<int32_t>(from[i].bits) << 16;
  Lanes result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

// The halves of a vector, added until one lane is left.
inline float Total(const Lanes& x) {
  Half8 a, b;
  std::memcpy(&a, &x, sizeof(a));
  std::memcpy(&b, reinterpret_cast<const char*>(&x) + sizeof(a), sizeof(b));
  a += b;
  Half4 c, d;
  std::memcpy(&c, &a, sizeof(c));
  std::memcpy(&d, reinterpret_cast<const char*>(&a) + sizeof(c), sizeof(d));
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
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
