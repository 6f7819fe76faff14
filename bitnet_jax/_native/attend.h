// Attention of a few queries over a cache of keys and values: softmax(q k^T / sqrt(d)) v.
//
// All query heads that share a key head go together, so keys and values are read once, where
// they lie. Everything is float32, in vectors of 16 whose order does not depend on the
// instruction set. Where there are fused multiplications they are used: last bits differ.

#pragma once

#include <cstdint>

#include "threads.h"

namespace bitnet {

// q and y: (batch, length, heads, dim). k and v: (batch, slots, kv_heads, dim). mask: (batch,
// length, slots), not zero where a query sees a slot; one that sees none gets zeros.
template <class Key>
struct Attention {
  const float* q;
  const Key* k;
  const Key* v;
  const uint8_t* mask;
  int64_t batch, length, heads, slots, kv_heads, dim;
  float* y;
};

template <class Key>
void Attend(Pool& pool, const Attention<Key>& attention);

}  // namespace bitnet
