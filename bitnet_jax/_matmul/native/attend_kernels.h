// Compiled once for each instruction set, inside a namespace of its own, after what vectors of
// 16 floats are there: attend_lanes.h or attend_neon.h. See attend.cc.

constexpr int64_t kTogether = 4;  // query heads at a time
constexpr int64_t kAhead = 12;    // slots; values of a few are asked for with their keys

inline float Wide(float x) { return x; }

inline float Wide(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// What is read so many slots later: slots of a head lie too far apart for the hardware to see.
template <class Key>
inline void Prefetch(const Key* from, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(Key);
  for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(from + d);
}

// e^x for x <= 0, to 2 ulp; Cephes' polynomial.
inline Lanes Exponential(Lanes x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to integers
  x = AtLeast(x, -87.0f);
  const Lanes shifted = x * 1.44269504088896341f + magic;
  const Lanes n = shifted - magic;
  const Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Lanes e = p * r * r + r + 1.0f;
  return TimesPower(e, shifted, 0x4B400000);  // the bits of magic
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

// Scores, where a slot is hidden minus infinity, to weights relative to the largest; returns
// what they sum to.
inline float Softmax(float* scores, int64_t count, float* largest) {
  const float hidden = -std::numeric_limits<float>::infinity();
  float most = hidden;
  for (int64_t t = 0; t < count; ++t) most = std::max(most, scores[t]);
  *largest = most;
  Lanes sum = {};
  for (int64_t t = 0; t < count; t += kLanes) {
    float block[kLanes];
    const int64_t length = std::min(kLanes, count - t);
    std::fill(block, block + kLanes, hidden);
    std::copy(scores + t, scores + t + length, block);
    const Lanes x = Load(block);
    const Lanes e = ZeroWhere(x, hidden, Exponential(x - most));
    sum += e;
    std::memcpy(block, &e, sizeof(block));
    std::copy(block, block + length, scores + t);
  }
  return Total(sum);
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
      if (count > kChunk && t + kAhead < count) {
        Prefetch(v + (t + kAhead) * v_stride + d, kWidth * kLanes);
      }
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
  while (d + kVectors * kLanes <= dim) vectors(std::integral_constant<int64_t, kVectors>{});
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

// One query token, one key head and some of the slots: all query heads of its group, a few at
// a time. y (group, dim) is not divided by the sums yet. `scores` has room for kTogether rows
// of slots.
template <class Key>
void Part(const Attention<Key>& a, int64_t b, int64_t l, int64_t kv, Slots slots, float* scores,
          Partial out) {
  const int64_t group = a.heads / a.kv_heads, stride = a.kv_heads * a.dim;
  const uint8_t* mask = a.mask + (b * a.length + l) * a.slots + slots.first;
  const int64_t at = (b * a.slots + slots.first) * stride + kv * a.dim;
  const int64_t count = slots.last - slots.first;
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
  for (int64_t h = 0; h < group; h += kTogether) {
    const int64_t heads = std::min(kTogether, group - h);
    const float* q = a.q + ((b * a.length + l) * a.heads + kv * group + h) * a.dim;
    for (int64_t i = heads; i < kTogether; ++i) {
      std::fill(scores + i * a.slots, scores + i * a.slots + count, 0.0f);
    }
    for (int64_t t = 0; t < count; ++t) {
      if (t + kAhead < count) Prefetch(a.k + at + (t + kAhead) * stride, a.dim);
      if (count <= kChunk) Prefetch(a.v + at + t * stride, a.dim);
      Score(q, a.k + at + t * stride, heads, a.dim, scores + t, a.slots);
      for (int64_t i = 0; i < heads; ++i) {
        float& score = scores[i * a.slots + t];
        score = mask[t] ? score * scale : -std::numeric_limits<float>::infinity();
      }
    }
    for (int64_t i = 0; i < heads; ++i) {
      out.sums[h + i] = Softmax(scores + i * a.slots, count, out.largest + h + i);
    }
    Gather(scores, a.slots, a.v + at, stride, count, heads, a.dim, out.y + h * a.dim);
  }
}
