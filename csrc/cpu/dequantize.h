// The whole matrix that codes stand for.
#pragma once

#include "capability.h"
#include "matrix.h"

namespace mft {

// out (N, K), contiguous, in its format.
void dequantize(const Capability& cpu, const Matrix& out, const Quantized& weight);

}  // namespace mft
