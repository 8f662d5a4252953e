// torch's own GEMM and square root on borrowed memory, through the dispatcher.
#pragma once

#include "matrix.h"

namespace mft {

// out = a @ b, all in one format.
void torch_matmul(const Matrix& out, const Matrix& a, const Matrix& b);

// out = x @ weight.T + bias; bias (columns of out,) or nullptr.
void torch_linear(const Matrix& out, const Matrix& x, const Matrix& weight, const void* bias);

// out[i] = sqrt(in[i]) as torch computes it. It may err by one unit in the last place (MKL's does, one time in five).
void torch_sqrt(float* out, const float* in, int64_t n);

}  // namespace mft
