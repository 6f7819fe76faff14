// A kernel of floats to ternary codes and scales, on a pool of threads.

#pragma once

#include "path.h"
#include "threads.h"

namespace bitnet {

// Slices (rows, outputs) of a kernel, each with scales of its own: one (`across`), or one for
// each output.
struct Ternarized {
  int64_t slices, rows, outputs;
  bool across;
  bool survivors;  // the scale is the mean of the weights that are kept
  float threshold, eps;
};

// w and codes (slices, rows, outputs), scale (slices, 1 or outputs).
template <class Float>
void QuantizeKernel(Pool& pool, const Ternarized& kernel, const Float* w, int8_t* codes,
                    float* scale);

}  // namespace bitnet
