// The masked linear layer and its gradients, with the mask fused into the packing of a GEMM (gemm.h).
//
// Shapes and meaning are those of linear.h. Every matrix except scores and out has the table's format. The weight is
// not empty.
#pragma once

#include <vector>

#include "gemm.h"
#include "linear.h"

namespace mft {

void fused_masked_linear(const Gemm& gemm, const Matrix& y, const Matrix& x, const Weight& weight,
                         const MaskSource& mask, const void* bias);

// Tokens from `first` to `end` share a mask.
struct Run {
  MaskSource mask;
  int64_t first, end;
};

// The same for at most kMostFarTokens tokens in runs, which are in the order of x and leave no token out. A row has the
// bits of fused_masked_linear() with its mask and at most kMostFarTokens tokens. The table has multiply_far_rows().
void fused_few_linear(const Gemm& gemm, const Matrix& y, const Matrix& x, const Weight& weight,
                      const std::vector<Run>& runs, const void* bias);

void fused_grad_x(const Gemm& gemm, const Matrix& d_x, const Matrix& grad_output, const Weight& weight,
                  const MaskSource& mask, const void* bias);

void fused_grad_scores(const Gemm& gemm, const Matrix& out, const Matrix& grad_output, const Matrix& x,
                       const Matrix& weight, const SignSource& sign, bool accumulate, bool fresh);

}  // namespace mft
