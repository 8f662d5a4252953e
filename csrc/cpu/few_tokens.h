// One token and few: products with the masked weight, bound by memory. The weight is read once, straight from where it
// lies: it is masked in registers and meets all tokens there, so neither it nor its mask is copied or packed.
//
//   dot   y (M, N) = x @ where(keep, weight, 0).T + bias: rows of the weight meet the tokens; each sum has one vector
//   sum   d_x (M, K) = grad_output @ where(keep, weight, 0): rows of the weight are added up in fp32, strips of columns
//
// A sum's order depends on neither the threads nor the number of tokens. fp32 throughout, one rounding at the end.
#pragma once

#include <cstdint>

#include "decode.h"
#include "row_kernels.h"

namespace mft {

constexpr int64_t kFewTokens = 64;       // in a turn, at most: their sums and they themselves fit L2
constexpr int64_t kDotRows = 8;          // rows of the weight at a time, at most; whoever splits rows splits at these
constexpr int64_t kStripColumns = 8192;  // the most columns in a strip of sum()

// One call. All matrices are contiguous and of one format; `tokens` and `scratch` are made by whoever calls.
struct FewTokens {
  Format format;
  int64_t count, rows, columns;  // M, N, K
  const char* weight;
  const void* scores;  // nullptr: take the words
  Format score_format;
  const uint32_t* words;
  KeepRange range;
  const char* bias;     // dot: (N,), sum: (K,), or nullptr
  const float* tokens;  // M rows, few_token_stride() apart, made by prepare_*()
  char* out;
  const int64_t* places = nullptr;  // dot: the row of `out` of each token; nullptr: its own
  bool one_row = false;             // the words are those of one row, and all rows have them
  // dot and sum: instead of `weight`, with memory for kDotRows of the rows or of the strips that are worked on.
  const Quantized* codes = nullptr;
  Decode decode = nullptr;
  char* room = nullptr;
};

// From one prepared token to the next: room for 32 columns more, and an odd number of cache lines, since tokens a power
// of two apart would share their sets of L1.
constexpr int64_t few_token_stride(int64_t length) { return (length + 31) / 32 * 32 + 16; }

// How many columns of d_x are summed at a time: the sums stay in L1, or nearly, but a row's share is no less than a
// page, as walks through page tables cost.
constexpr int64_t few_strip_columns(Format format, int64_t count) {
  const int64_t page = 4096 / bytes_of(format), fitting = kStripColumns / count / 32 * 32;
  return page > fitting ? page : fitting;
}

struct FewKernels {
  // One token as dot() or sum() reads it, zeros behind it.
  void (*prepare_dot)(float* out, const void* token, Format format, int64_t length);
  void (*prepare_sum)(float* out, const void* token, Format format, int64_t length);

  // y[:, first .. end), with scratch for kDotRows rows of words.
  void (*dot)(const FewTokens& call, int64_t first_row, int64_t end_row, uint32_t* scratch);
  // The same of several calls that share weight, bias and out, each with tokens and words of its own, or with neither words
  // nor scores: then all is kept, as `all` says, the words of one row. The weight is read once for all of them.
  void (*dot_many)(const FewTokens* calls, int64_t count, int64_t first_row, int64_t end_row, const uint32_t* all);
  // d_x[:, first .. end) + bias, first a multiple of 32, with scratch for few_strip_columns() + 16 floats a token.
  void (*sum)(const FewTokens& call, int64_t first_column, int64_t end_column, float* scratch);
};

const FewKernels& portable_few_kernels();
const FewKernels& avx2_few_kernels();
const FewKernels& avx512_few_kernels();
const FewKernels& avx512_bf16_few_kernels();

}  // namespace mft
