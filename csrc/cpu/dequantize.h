// Decodes a whole matrix of codes.
#pragma once

#include "capability.h"
#include "matrix.h"

namespace mft {

// Writes the decoded weight to out (N, K), which is contiguous, in the format of out.
void dequantize(const Capability& cpu, const Matrix& out, const Quantized& weight);

}  // namespace mft
