// The masked linear layer and its score gradient in bf16, the mask fused into the packing of a GEMM (gemm_bfloat16.h).
//
// Same shapes and meaning as linear.h, every matrix but scores and out in bf16; needs AVX512-BF16.
#pragma once

#include "linear.h"

namespace mft {

struct FusedLinear {
  void (*masked_linear)(const Matrix& y, const Matrix& x, const Matrix& weight, const MaskSource& mask,
                        const void* bias);
  void (*grad_x)(const Matrix& d_x, const Matrix& grad_output, const Matrix& weight, const MaskSource& mask);
  void (*grad_scores)(const Matrix& out, const Matrix& grad_output, const Matrix& x, const Matrix& weight,
                      const SignSource& sign, bool accumulate);
};

// Compiled in where the compiler knows AVX512-BF16 (MFT_DOT_BFLOAT16).
const FusedLinear& fused_linear();

}  // namespace mft
