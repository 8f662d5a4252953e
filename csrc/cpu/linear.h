// The masked linear layer and its gradients. Neither the whole mask nor the whole masked weight is ever in memory.
//
// Shapes: x (M, K), weight (N, K), grad_output (M, N). All rows are contiguous. If the requested path cannot serve, it
// is an error (choice.h).
#pragma once

#include "capability.h"
#include "choice.h"
#include "matrix.h"
#include "weight.h"

namespace mft {

// The source of the mask of the whole weight: scores and a range, or packed words (N, ceil(K / 32)).
struct MaskSource {
  const void* scores;  // nullptr: use the words
  Format score_format;
  const uint32_t* words;
  KeepRange range;
  int64_t columns;
  bool keeps_all = false;  // the words are those of one row, all ones

  // Returns the mask of row r from column `first` on, which is a multiple of 32.
  MaskRow row(int64_t r, int64_t first = 0) const {
    if (scores != nullptr) {
      return {static_cast<const char*>(scores) + (r * columns + first) * bytes_of(score_format), nullptr, range};
    }
    return {nullptr, words + (keeps_all ? 0 : r * ((columns + 31) / 32)) + first / 32, range};
  }
};

// Returns the mask that keeps everything. `words` receives those of one row.
MaskSource keep_all(std::vector<uint32_t>& words, int64_t columns);

// The source of the sign of the scores. Both nullptr: no sign factor.
struct SignSource {
  const void* scores;
  Format score_format;
  const uint32_t* words;
  int64_t columns;

  SignRow row(int64_t r) const {
    if (words != nullptr) return {nullptr, words + r * ((columns + 31) / 32)};
    if (scores == nullptr) return {nullptr, nullptr};
    return {static_cast<const char*>(scores) + r * columns * bytes_of(score_format), nullptr};
  }
};

// Columns first .. end of a result.
struct Columns {
  int64_t first, end;
};

// Returns the product as choice.h takes it: first for the forward and d_x, then for the score gradient.
Call call_of(Product product, const Matrix& weight, const MaskSource& mask, int64_t tokens);
Call call_of(const Matrix& out, const Matrix& weight, const SignSource& sign, bool accumulate, int64_t tokens);

// y (M, N) = x @ where(keep, weight, 0).T + bias; bias (N,) in x's format, or nullptr.
void masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Weight& weight,
                   const MaskSource& mask, const void* bias, Path path = Path::kAuto);

// d_x (M, K) = grad_output @ where(keep, weight, 0) [+ bias]; bias (K,) is for a layer whose weight is stored
// transposed.
void grad_x(const Capability& cpu, const Matrix& d_x, const Matrix& grad_output, const Weight& weight,
            const MaskSource& mask, Path path = Path::kAuto, const void* bias = nullptr);

// d_weight (N, K) = where(keep, grad_output.T @ x, 0)
void grad_weight(const Capability& cpu, const Matrix& d_weight, const Matrix& grad_output, const Matrix& x,
                 const MaskSource& mask);

// out (N, K) = [out +] (grad_output.T @ x) [* weight] [* sign(scores)]; weight.data nullptr: no weight factor.
// fresh: nobody has written to out yet, and it is part of a tensor that is larger than the cache.
void grad_scores(const Capability& cpu, const Matrix& out, const Matrix& grad_output, const Matrix& x,
                 const Matrix& weight, const SignSource& sign, bool accumulate, Path path = Path::kAuto,
                 bool fresh = false);

}  // namespace mft
