// A table of function pointers: what one instruction set does to a row of a matrix.
//
// Every decision "is this weight kept?" is made on integers: a score's bits map to a key that orders like its value,
// and keep is `key - low < count` in unsigned arithmetic. So NaN scores are dropped (their keys lie outside every
// range), -0 equals +0, and no floating-point flag of a compiler can change a mask.
#pragma once

#include <cstdint>

namespace mft {

enum class Format : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int bytes_of(Format format) { return format == Format::kFloat32 ? 4 : 2; }

// keep iff key(score) - low < count. Magnitude: key = bits without the sign; else key = bits in two's complement order.
struct KeepRange {
  uint32_t low;
  uint32_t count;
  bool magnitude;
};

// Where the mask of a row comes from: scores and a range, or packed words (bit j % 32 of word j / 32).
struct MaskRow {
  const void* scores;     // nullptr: use the words
  const uint32_t* words;
  KeepRange range;
};

// Where the sign factor of a row's score gradient comes from; both nullptr: no factor.
struct SignRow {
  const void* scores;     // sign(score), sign(0) = 0
  const uint32_t* words;  // bit set: +1, clear: -1
};

// Three ranges of one kind, and how many scores lie in each.
struct Ranges {
  KeepRange below, inside, above;
};
struct WindowCount {
  int64_t below, inside, above;
};

struct RowKernels {
  // out[j] = keep[j] ? weight[j] : +0. out may be weight. score_format is not read if words are given.
  void (*mask)(void* out, const void* weight, int weight_bytes, MaskRow mask, Format score_format, int64_t columns);

  // out[j] = round(old + grad[j] * weight[j] * sign[j]), old = accumulate ? out[j] : 0, in fp32; weight nullptr: all 1.
  void (*score_grad)(void* out, Format out_format, const void* grad, Format grad_format, const void* weight,
                     Format weight_format, SignRow sign, Format score_format, bool accumulate, int64_t columns);

  // words[j / 32] bit j % 32 = keep[j]; the padding bits of the last word are 0.
  void (*pack)(uint32_t* words, const void* scores, Format score_format, KeepRange range, int64_t columns);

  // How many scores lie in the range.
  int64_t (*count)(const void* scores, Format score_format, KeepRange range, int64_t columns);

  // Counts, and writes the keys inside, less the least of that range, to keys, which has place for columns + 16.
  WindowCount (*window)(uint32_t* keys, const void* scores, Format score_format, const Ranges& ranges, int64_t columns);
};

// The tables. chosen_capability() returns none that was not compiled in or that this machine lacks.
const RowKernels& portable_row_kernels();
const RowKernels& avx2_row_kernels();
const RowKernels& avx512_row_kernels();

}  // namespace mft
