// The products of many matrices, each with its own rows of tokens: a mixture's experts. Each is a product of linear.h,
// by the path that choice.h takes for its tokens. So its bits do not depend on other experts. They depend on the
// threads only if those of torch's GEMM do. shared_work.h says which threads compute it.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace mft {

// The matrices (N, K) of all experts. strides: in elements, of experts, rows and columns.
struct Experts {
  void* data;  // nullptr: there are none
  Format format;
  int64_t count, rows, columns;
  int64_t strides[3];
};

// Where the experts' masks come from: like MaskSource, one expert after the other, each with its own range.
struct ExpertMasks {
  const void* scores;  // nullptr: use the words
  Format score_format;
  const uint32_t* words;
  std::vector<KeepRange> ranges;
};

// y (T, N) = x @ where(keep, weight, 0).T + bias, with x (T, K) and bias (E, N) or nullptr.
// transposed: y (T, K) = x @ where(keep, weight, 0) + bias, with x (T, N) and bias (E, K) or nullptr.
//
// Rows offsets[e - 1] (0 for the first expert) to offsets[e] belong to expert e. Other rows of y become 0. `asked`: the
// path for the experts that it can serve; the others take the fastest.
void grouped_product(const Capability& cpu, const Matrix& y, const Matrix& x, const Experts& weight,
                     const ExpertMasks& masks, const int32_t* offsets, const void* bias, bool transposed, Path asked);

// out (E, N, K), contiguous, = [out +] (grad_output.T @ x of the rows of each expert) [* weight] [* sign(scores)]. For
// an expert without rows, out becomes 0, or stays as it is if `accumulate`.
void grouped_grad_scores(const Capability& cpu, const Experts& out, const Matrix& grad_output, const Matrix& x,
                         const int32_t* offsets, const Experts& weight, const SignSource& sign, bool accumulate,
                         Path asked);

}  // namespace mft
