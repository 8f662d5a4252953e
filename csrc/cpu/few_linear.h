// The masked linear layer and its d_x for few tokens, by the kernels of few_tokens.h.
#pragma once

#include "few_tokens.h"
#include "linear.h"

namespace mft {

// masked_linear() and grad_x() of linear.h, nothing empty.
void few_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
                       const MaskSource& mask, const void* bias);
void few_grad_x(const Capability& cpu, const Matrix& d_x, const Matrix& grad_output, const Matrix& weight,
                const MaskSource& mask);

}  // namespace mft
