// The masked linear layer and its score gradient, the mask fused into the packing of a GEMM (gemm.h).
//
// Same shapes and meaning as linear.h, every matrix but scores and out in the table's format, the weight not empty.
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
