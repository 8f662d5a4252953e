// The masked linear layer and its gradients, with the mask fused into the packing of a GEMM (gemm.h).
//
// Shapes and meaning are those of linear.h. Every matrix except scores and out has the table's format. The weight is
// not empty.
#pragma once

#include "gemm.h"
#include "linear.h"

namespace mft {

void fused_masked_linear(const Gemm& gemm, const Matrix& y, const Matrix& x, const Weight& weight,
                         const MaskSource& mask, const void* bias);

void fused_grad_x(const Gemm& gemm, const Matrix& d_x, const Matrix& grad_output, const Weight& weight,
                  const MaskSource& mask, const void* bias);

void fused_grad_scores(const Gemm& gemm, const Matrix& out, const Matrix& grad_output, const Matrix& x,
                       const Matrix& weight, const SignSource& sign, bool accumulate, bool fresh);

}  // namespace mft
