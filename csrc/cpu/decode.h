// Weights that are stored as codes, and how one instruction set decodes part of a row.
//
//   table  w[i] = level[code[i]] * absmax[i / block]   i over the whole matrix; two codes per byte, the first
//                                                      in the high bits
//   int8   w[n, k] = code[n, k] * (absmax[n] / 127)
//
// The format defines levels and block (mft_kernels/codes.py). Products are computed in fp32 and rounded once to the
// requested format. For nf4 the result equals bitsandbytes' dequantize_4bit bit for bit. With double quantisation,
// absmax[b] = map[absmax_codes[b]] * nested[b / 256] + offset, in fp32, rounded twice.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace mft {

constexpr int kLevels = 16;
constexpr int64_t kNestedBlock = 256;  // absmax codes that share one nested scale

struct Quantized {
  int64_t block;  // weights that share an absmax, if levels[] decodes them; 0: int8
  int64_t rows, columns;
  const void* codes;
  const float* absmax;  // nullptr: the absmax is quantised too
  const uint8_t* absmax_codes;
  const float *nested, *map;
  float offset;
  alignas(64) float levels[kLevels];

  float absmax_of(int64_t block) const {
    if (absmax != nullptr) return absmax[block];
    return map[absmax_codes[block]] * nested[block / kNestedBlock] + offset;
  }
};

struct Span {
  const char* from;
  int64_t bytes;
};

// Returns where the codes of w[row, first .. first + count) lie.
inline Span codes_span(const Quantized& weight, int64_t row, int64_t first, int64_t count) {
  const int64_t index = row * weight.columns + first;
  const auto* codes = static_cast<const char*>(weight.codes);
  return weight.block != 0 ? Span{codes + index / 2, (count + 1) / 2} : Span{codes + index, count};
}

// out[0 .. count) = w[row, first .. first + count)
using Decode = void (*)(void* out, Format format, const Quantized& weight, int64_t row, int64_t first, int64_t count);

void portable_decode(void* out, Format format, const Quantized& weight, int64_t row, int64_t first, int64_t count);
void avx2_decode(void* out, Format format, const Quantized& weight, int64_t row, int64_t first, int64_t count);
void avx512_decode(void* out, Format format, const Quantized& weight, int64_t row, int64_t first, int64_t count);
void avx512_bf16_decode(void* out, Format format, const Quantized& weight, int64_t row, int64_t first, int64_t count);

}  // namespace mft
