// Compiled once for each instruction set, inside a namespace of its own: attend.cc.

using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
using Words = int32_t __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;
constexpr int64_t kTogether = 4;  // query heads, and vectors of a value, at a time

inline Lanes Load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }

inline Lanes Load(const BFloat16* from) {
  Words wide;
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = static_cast<int32_t>(from[i].bits) << 16;
  Lanes result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

inline float Wide(float x) { return x; }

inline float Wide(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// The halves of a vector, added until one lane is left.
inline float Total(const Lanes& x) {
  float half[kLanes];
  std::memcpy(half, &x, sizeof(half));
  for (int64_t n = kLanes / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) half[i] += half[i + n];
  }
  return half[0];
}

// e^x for x <= 0, to 2 ulp; Cephes' polynomial.
inline Lanes Exponential(Lanes x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to integers
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  const Lanes shifted = x * 1.44269504088896341f + magic;
  const Lanes n = shifted - magic;
  const Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Lanes e = p * r * r + r + 1.0f;
  Words bits, power;
  std::memcpy(&bits, &e, sizeof(bits));
  std::memcpy(&power, &shifted, sizeof(power));
  bits += (power - 0x4B400000) << 23;  // the bits of magic
  Lanes result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Scores of `heads` queries, each (dim,), against one key.
template <class Key>
inline void Score(const float* q, const Key* k, int64_t heads, int64_t dim, float* scores,
                  int64_t stride) {
  Lanes sums[kTogether] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const Lanes key = Load(k + d);
    for (int64_t h = 0; h < heads; ++h) sums[h] += Load(q + h * dim + d) * key;
  }
  for (int64_t h = 0; h < heads; ++h) {
    float total = Total(sums[h]);
    for (int64_t i = d; i < dim; ++i) total += q[h * dim + i] * Wide(k[i]);
    scores[h * stride] = total;
  }
}

// Scores, where a slot is hidden minus infinity, to weights; returns what they sum to.
inline float Softmax(float* scores, int64_t count) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < count; ++t) largest = std::max(largest, scores[t]);
  Lanes sum = {};
  int64_t t = 0;
  for (; t + kLanes <= count; t += kLanes) {
    const Lanes x = Load(scores + t);
    const Lanes e = x == -std::numeric_limits<float>::infinity() ? Lanes{} : Exponential(x - largest);
    *reinterpret_cast<Lanes*>(scores + t) = e;
    sum += e;
  }
  if (t == count) return Total(sum);
  float rest[kLanes];
  std::fill(rest, rest + kLanes, -std::numeric_limits<float>::infinity());
  std::copy(scores + t, scores + count, rest);
  const Lanes x = Load(rest);
  const Lanes e = x == -std::numeric_limits<float>::infinity() ? Lanes{} : Exponential(x - largest);
  std::memcpy(rest, &e, sizeof(rest));
  std::copy(rest, rest + (count - t), scores + t);
  return Total(sum + e);
}

// Weighted sums of values, (heads, dim).
template <class Key>
inline void Gather(const float* weights, int64_t weight_stride, const Key* v, int64_t v_stride,
                   int64_t count, int64_t heads, int64_t dim, float* y) {
  int64_t d = 0;
  const auto vectors = [&](auto width) {
    constexpr int64_t kWidth = decltype(width)::value;
    Lanes sums[kTogether][kWidth] = {};
    for (int64_t t = 0; t < count; ++t) {
      Lanes value[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) value[i] = Load(v + t * v_stride + d + i * kLanes);
      for (int64_t h = 0; h < kTogether; ++h) {
        const float weight = weights[h * weight_stride + t];
        for (int64_t i = 0; i < kWidth; ++i) sums[h][i] += weight * value[i];
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < kWidth; ++i) {
        std::memcpy(y + h * dim + d + i * kLanes, &sums[h][i], sizeof(Lanes));
      }
    }
    d += kWidth * kLanes;
  };
  while (d + kTogether * kLanes <= dim) vectors(std::integral_constant<int64_t, kTogether>{});
  while (d + kLanes <= dim) vectors(std::integral_constant<int64_t, 1>{});
  for (; d < dim; ++d) {
    for (int64_t h = 0; h < heads; ++h) {
      float sum = 0;
      for (int64_t t = 0; t < count; ++t) {
        sum += weights[h * weight_stride + t] * Wide(v[t * v_stride + d]);
      }
      y[h * dim + d] = sum;
    }
  }
}

// One query token and one key head: all query heads of its group, a few at a time. `scores`
// has room for kTogether rows of slots, the rows beyond the last head zeroed.
template <class Key>
void One(const Attention<Key>& a, int64_t b, int64_t l, int64_t kv, float* scores) {
  const int64_t group = a.heads / a.kv_heads, stride = a.kv_heads * a.dim;
  const uint8_t* mask = a.mask + (b * a.length + l) * a.slots;
  int64_t first = 0, last = a.slots;
  while (first < last && !mask[first]) ++first;
  while (last > first && !mask[last - 1]) --last;
  const int64_t at = (b * a.slots + first) * stride + kv * a.dim, count = last - first;
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
  for (int64_t h = 0; h < group; h += kTogether) {
    const int64_t heads = std::min(kTogether, group - h);
    const int64_t out = ((b * a.length + l) * a.heads + kv * group + h) * a.dim;
    if (count == 0) {
      std::fill(a.y + out, a.y + out + heads * a.dim, 0.0f);
      continue;
    }
    std::fill(scores, scores + kTogether * a.slots, 0.0f);
    for (int64_t t = 0; t < count; ++t) {
      Score(a.q + out, a.k + at + t * stride, heads, a.dim, scores + t, a.slots);
      for (int64_t i = 0; i < heads; ++i) {
        float& score = scores[i * a.slots + t];
        score = mask[first + t] ? score * scale : -std::numeric_limits<float>::infinity();
      }
    }
    float sums[kTogether];
    for (int64_t i = 0; i < heads; ++i) sums[i] = Softmax(scores + i * a.slots, count);
    Gather(scores, a.slots, a.v + at, stride, count, heads, a.dim, a.y + out);
    for (int64_t i = 0; i < heads; ++i) {
      for (int64_t d = 0; d < a.dim; ++d) a.y[out + i * a.dim + d] /= sums[i];
    }
  }
}
