// Compiled once for each instruction set, inside a namespace of its own, after what vectors of
// 16 floats are there: attend_lanes.h or attend_neon.h. See attend.cc.

constexpr int64_t kTogether = 4;  // query heads at a time
constexpr int64_t kAhead = 12;    // slots

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

// Products of H queries and up to four keys, with names all the way: see Codes in kernels.h.
template <int H>
struct Scores {
  Lanes a{}, b{}, c{}, d{};
  Scores<H - 1> rest{};

  template <int K>
  BITNET_INLINE void Add(const float* q, int64_t dim, const Lanes (&keys)[K]) {
    const Lanes query = Load(q);
    a += query * keys[0];
    if constexpr (K > 1) b += query * keys[1];
    if constexpr (K > 2) c += query * keys[2];
    if constexpr (K > 3) d += query * keys[3];
    rest.Add(q + dim, dim, keys);
  }
  // Of a head, its keys side by side; heads `stride` apart.
  template <int K>
  BITNET_INLINE void Sum(float* scores, int64_t stride) const {
    scores[0] = Total(a);
    if constexpr (K > 1) scores[1] = Total(b);
    if constexpr (K > 2) scores[2] = Total(c);
    if constexpr (K > 3) scores[3] = Total(d);
    rest.template Sum<K>(scores + stride, stride);
  }
};

template <>
struct Scores<0> {
  template <int K>
  BITNET_INLINE void Add(const float*, int64_t, const Lanes (&)[K]) {}
  template <int K>
  BITNET_INLINE void Sum(float*, int64_t) const {}
};

// Scores of H queries, each (dim,), against K keys that are `k_stride` apart.
template <int H, int K, class Key>
BITNET_INLINE void Score(const float* q, const Key* k, int64_t k_stride, int64_t dim, float* scores,
                         int64_t stride) {
  Scores<H> sums;
  int64_t at = 0;
  for (; at + kLanes <= dim; at += kLanes) {
    Lanes keys[K];
    for (int i = 0; i < K; ++i) keys[i] = Load(k + i * k_stride + at);
    sums.Add(q + at, dim, keys);
  }
  sums.template Sum<K>(scores, stride);
  for (; at < dim; ++at) {
    for (int h = 0; h < H; ++h) {
      for (int i = 0; i < K; ++i) {
        scores[h * stride + i] += q[h * dim + at] * Wide(k[i * k_stride + at]);
      }
    }
  }
}

// Of all slots; values of a few slots are asked for with their keys.
template <int H, class Key>
void ScoreAll(const float* q, const Key* k, const Key* v, int64_t k_stride, int64_t count,
              int64_t dim, float* scores, int64_t stride) {
  int64_t t = 0;
  const auto some = [&](auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    for (; t + kKeys <= count; t += kKeys) {
      for (int i = 0; i < kKeys; ++i) {
        if (t + i + kAhead < count) Prefetch(k + (t + i + kAhead) * k_stride, dim);
        if (count <= kChunk) Prefetch(v + (t + i) * k_stride, dim);
      }
      Score<H, kKeys>(q, k + t * k_stride, k_stride, dim, scores + t, stride);
    }
  };
  some(std::integral_constant<int, kKeysTogether>{});
  some(std::integral_constant<int, 1>{});
}

// Scores, times what the mask shows, to weights relative to the largest; returns what they sum
// to. A slot that is hidden has minus infinity.
inline float Softmax(float* scores, const uint8_t* mask, float scale, int64_t count,
                     float* largest) {
  const float hidden = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < count; ++t) scores[t] = mask[t] ? scores[t] * scale : hidden;
  float block[kLanes];
  std::fill(block, block + kLanes, hidden);
  int64_t t = 0;
  for (; t + kLanes <= count; t += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) block[i] = std::max(block[i], scores[t + i]);
  }
  for (; t < count; ++t) block[0] = std::max(block[0], scores[t]);
  const float most = *std::max_element(block, block + kLanes);
  *largest = most;
  Lanes sum = {};
  const auto weigh = [&](float* some) {
    const Lanes x = Load(some);
    const Lanes e = ZeroWhere(x, hidden, Exponential(x - most));
    sum += e;
    std::memcpy(some, &e, sizeof(e));
  };
  for (t = 0; t + kLanes <= count; t += kLanes) weigh(scores + t);
  if (t < count) {
    std::fill(block, block + kLanes, hidden);
    std::copy(scores + t, scores + count, block);
    weigh(block);
    std::copy(block, block + count - t, scores + t);
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
    constexpr void (*kScore[])(const float*, const Key*, const Key*, int64_t, int64_t, int64_t,
                               float*, int64_t) = {nullptr, ScoreAll<1, Key>, ScoreAll<2, Key>,
                                                   ScoreAll<3, Key>, ScoreAll<4, Key>};
    kScore[heads](q, a.k + at, a.v + at, stride, count, a.dim, scores, a.slots);
    for (int64_t i = 0; i < heads; ++i) {
      out.sums[h + i] = Softmax(scores + i * a.slots, mask, scale, count, out.largest + h + i);
    }
    Gather(scores, a.slots, a.v + at, stride, count, heads, a.dim, out.y + h * a.dim);
  }
}
