// The products of many matrices with rows of tokens of their own: a mixture's experts. Each is a product of linear.h, by
// the path that choice.h takes for its tokens, so its bits depend on no other expert, nor on threads but where torch's GEMM's
// do; shared_work.h says who makes it.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace mft {

// The matrices (N, K) of all experts. Strides in elements, of experts, rows and columns.
struct Experts {
  void* data;  // nullptr: there are none
  Format format;
  int64_t count, rows, columns;
  int64_t strides[3];
};

// Where their masks come from: as MaskSource, one expert behind the other, each with a range of its own.
struct ExpertMasks {
  const void* scores;  // nullptr: take the words
  Format score_format;
  const uint32_t* words;
  std::vector<KeepRange> ranges;
};

// y of x (T, K) with x @ where(keep, weight, 0).T + bias for the rows of each expert, or transposed, of x (T, N), without
// the .T. Those of expert e are rows offsets[e - 1] (0 for the first) to offsets[e]; other rows of y become 0. bias
// (E, N), transposed (E, K), or nullptr. `asked`: the path where it can serve; elsewhere the fastest.
void grouped_product(const Capability& cpu, const Matrix& y, const Matrix& x, const Experts& weight,
                     const ExpertMasks& masks, const int32_t* offsets, const void* bias, bool transposed, Path asked);

// out (E, N, K), without gaps, = [out +] (grad_output.T @ x of the rows of an expert) [* weight] [* sign(scores)]. Of an
// expert without rows 0, or what it was.
void grouped_grad_scores(const Capability& cpu, const Experts& out, const Matrix& grad_output, const Matrix& x,
                         const int32_t* offsets, const Experts& weight, const SignSource& sign, bool accumulate,
                         Path asked);

}  // namespace mft
