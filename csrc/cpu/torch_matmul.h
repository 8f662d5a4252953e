// torch's own GEMM on borrowed memory, through the dispatcher.
#pragma once

#include "matrix.h"

namespace mft {

// out = a @ b, all in one format.
void torch_matmul(const Matrix& out, const Matrix& a, const Matrix& b);

// out = x @ weight.T + bias; bias (columns of out,) or nullptr.
void torch_linear(const Matrix& out, const Matrix& x, const Matrix& weight, const void* bias);

}  // namespace mft
