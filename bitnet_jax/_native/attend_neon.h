// Vectors of 16 floats as four registers of Arm: where there is no register of 64 bytes, GCC
// keeps attend_lanes.h's in memory. For attend_kernels.h; the same sums in the same order.

struct Lanes {
  float32x4_t a, b, c, d;
};

constexpr int64_t kLanes = 16;
constexpr int64_t kVectors = 1;  // of a value, at a time: sums of four heads fill 16 registers

// The same for each register.
template <class Each>
inline Lanes ForEach(const Lanes& x, const Lanes& y, const Each& each) {
  return {each(x.a, y.a), each(x.b, y.b), each(x.c, y.c), each(x.d, y.d)};
}

inline Lanes Every(float x) {
  const float32x4_t four = vdupq_n_f32(x);
  return {four, four, four, four};
}

inline Lanes operator+(const Lanes& x, const Lanes& y) {
  return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d};
}
inline Lanes operator-(const Lanes& x, const Lanes& y) {
  return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d};
}
inline Lanes operator*(const Lanes& x, const Lanes& y) {
  return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d};
}
inline Lanes operator+(const Lanes& x, float y) { return x + Every(y); }
inline Lanes operator-(const Lanes& x, float y) { return x - Every(y); }
inline Lanes operator*(const Lanes& x, float y) { return x * Every(y); }
inline Lanes operator*(float x, const Lanes& y) { return Every(x) * y; }
inline void operator+=(Lanes& x, const Lanes& y) { x = x + y; }

inline Lanes Load(const float* from) {
  return {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)};
}

inline Lanes Load(const BFloat16* from) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
  const uint16x8_t low = vld1q_u16(bits), high = vld1q_u16(bits + 8);
  const auto wide = [](uint16x4_t four) { return vreinterpretq_f32_u32(vshll_n_u16(four, 16)); };
  return {wide(vget_low_u16(low)), wide(vget_high_u16(low)), wide(vget_low_u16(high)),
          wide(vget_high_u16(high))};
}

// The halves of a vector, added until one lane is left.
inline float Total(const Lanes& x) {
  const float32x4_t four = (x.a + x.c) + (x.b + x.d);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

inline Lanes AtLeast(const Lanes& x, float least) {
  return ForEach(x, Every(least), [](float32x4_t value, float32x4_t lowest) {
    return vbslq_f32(vcltq_f32(value, lowest), lowest, value);  // NaN stays NaN
  });
}

// `value`, but 0 where x is `what`.
inline Lanes ZeroWhere(const Lanes& x, float what, const Lanes& value) {
  const float32x4_t whats = vdupq_n_f32(what);
  return ForEach(x, value, [&](float32x4_t four, float32x4_t kept) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(kept), vceqq_f32(four, whats)));
  });
}

// x times 2 to the power of what the bits of `power` are above `zero`.
inline Lanes TimesPower(const Lanes& x, const Lanes& power, int32_t zero) {
  const int32x4_t zeros = vdupq_n_s32(zero);
  return ForEach(x, power, [&](float32x4_t value, float32x4_t shifted) {
    const int32x4_t shift = vshlq_n_s32(vreinterpretq_s32_f32(shifted) - zeros, 23);
    return vreinterpretq_f32_s32(vreinterpretq_s32_f32(value) + shift);
  });
}
