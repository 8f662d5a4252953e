// Products of one or a few tokens with the masked weight, which are bound by memory. The weight is read once, from
// where it lies. It is masked in registers and multiplied there with all tokens, so neither it nor its mask is copied
// or packed.
//
//   dot   y (M, N) = x @ where(keep, weight, 0).T + bias: dot products of rows of the weight and tokens, each with one
//         vector of sums
//   sum   d_x (M, K) = grad_output @ where(keep, weight, 0) + bias: scaled rows of the weight are added up in strips
//         of columns
//
// The order of a sum depends on neither the threads nor the number of tokens. Sums are in fp32 and rounded once, at the
// end.
#pragma once

#include <cstdint>

#include "decode.h"
#include "row_kernels.h"

namespace mft {

constexpr int64_t kFewTokens = 64;       // most tokens in a turn: they and their sums fit L2
constexpr int64_t kDotRows = 8;          // most rows of the weight at a time; rows are split at multiples of it
constexpr int64_t kStripColumns = 8192;  // the most columns in a strip of sum()

// One call. All matrices are contiguous and of one format. The caller provides `tokens` and the scratch memory.
struct FewTokens {
  Format format;
  int64_t count, rows, columns;  // M, N, K
  const char* weight;
  const void* scores;  // nullptr: use the words
  Format score_format;
  const uint32_t* words;
  KeepRange range;
  const char* bias;     // dot: (N,), sum: (K,), or nullptr
  const float* tokens;  // M rows, few_token_stride() apart, made by prepare_*()
  char* out;
  const int64_t* places = nullptr;  // dot: the row of `out` for each token; nullptr: row t for token t
  bool keeps_all = false;           // the words are those of one row, all ones
  // dot and sum: codes instead of `weight`. room: memory for kDotRows rows, or strips of rows, while they are decoded.
  const Quantized* codes = nullptr;
  Decode decode = nullptr;
  char* room = nullptr;
};

// The distance of prepared tokens, in floats: `length` padded to 32 columns, plus one cache line. This is an odd number
// of cache lines, because tokens a power of two apart would share their sets of L1.
constexpr int64_t few_token_stride(int64_t length) { return (length + 31) / 32 * 32 + 16; }

// How many columns of d_x are summed at a time. Their sums stay in L1, or nearly. But a strip has at least one memory
// page of each row, because page-table walks are costly.
constexpr int64_t few_strip_columns(Format format, int64_t count) {
  const int64_t page = 4096 / bytes_of(format), fitting = kStripColumns / count / 32 * 32;
  return page > fitting ? page : fitting;
}

struct FewKernels {
  // Writes one token as dot() or sum() reads it, padded with zeros.
  void (*prepare_dot)(float* out, const void* token, Format format, int64_t length);
  void (*prepare_sum)(float* out, const void* token, Format format, int64_t length);

  // Computes y[:, first_row .. end_row). scratch has room for kDotRows rows of words.
  void (*dot)(const FewTokens& call, int64_t first_row, int64_t end_row, uint32_t* scratch);
  // The same for several calls that share weight, bias and out. Each has its own tokens and words. The weight is read
  // once for all calls.
  void (*dot_many)(const FewTokens* calls, int64_t count, int64_t first_row, int64_t end_row);
  // Computes d_x[:, first_column .. end_column) + bias. first_column is a multiple of 32. scratch has room for
  // few_strip_columns() + 16 floats per token.
  void (*sum)(const FewTokens& call, int64_t first_column, int64_t end_column, float* scratch);
};

const FewKernels& portable_few_kernels();
const FewKernels& avx2_few_kernels();
const FewKernels& avx512_few_kernels();
const FewKernels& avx512_bf16_few_kernels();

}  // namespace mft
