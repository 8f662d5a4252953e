// How quantized_sm80 and decode_codes_sm80 decode quantised weights. code_levels.h defines the codes.
#pragma once

#include <algorithm>

#include "code_levels.h"
#include "tile_sm80.h"

namespace mft::cuda::sm80 {

constexpr int kGroup = 32;  // neighbouring weights of a row: 16 bytes of codes in nf4, 32 in int8

// Return whether the rows of the weight are whole groups with aligned codes, and the rows of `in` whole chunks.
inline bool is_whole(const QuantizedProduct& p) {
  return p.weight.columns % kGroup == 0 && reinterpret_cast<uintptr_t>(p.weight.codes) % kChunkBytes == 0 &&
         view_of(p.in).chunked;
}

struct CodesArguments {
  const char* codes;
  const float* absmax;  // null: double quantisation
  const uint8_t* absmax_codes;
  const float *nested, *map, *offset;
  const uint32_t* words;  // null: every weight is kept
  float levels[16];
};

inline CodesArguments codes_arguments(const QuantizedProduct& p) {
  const Quantized& w = p.weight;
  const auto* const codes = static_cast<const char*>(w.codes);
  CodesArguments a = {codes, w.absmax, w.absmax_codes, w.nested, w.map, w.offset, p.words, {}};
  std::copy(kNf4Levels, kNf4Levels + 16, a.levels);
  return a;
}

// Look up the levels of 8 codes. The table in shared memory has 16 entries in 16 different banks, so no two lanes wait
// for each other. Two shifts turn all codes into byte offsets into the table, one per byte.
MFT_DEVICE void levels_of(float (&levels)[8], const char* table, uint32_t codes) {
  const uint32_t even = codes >> 2 & 0x3c3c3c3c, odd = codes << 2 & 0x3c3c3c3c;
  for (int i = 0; i < 4; ++i) {
    levels[2 * i] = isa::load_at_byte(table, even, i);
    levels[2 * i + 1] = isa::load_at_byte(table, odd, i);
  }
}

// Convert 8 int8 codes to floats. A byte b in the mantissa of 2^23 gives 2^23 + b. Its sign bit is flipped, which adds
// another 128; 8388736 is 2^23 + 128.
MFT_DEVICE void numbers_of(float (&numbers)[8], uint32_t low, uint32_t high) {
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = isa::byte_of((i < 4 ? low : high) ^ 0x80808080, i % 4, 0x4b000000);
    numbers[i] = isa::add(isa::as_float(bits), -8388736.0f);
  }
}

// Return the pair of weights, with 0 where the mask drops one. Their bits are 2 * pair and 2 * pair + 1 of byte `byte`
// of the word. The shifts are the same for every byte, so the compiler computes them once.
MFT_DEVICE uint32_t select_pair(uint32_t weights, uint32_t word, int byte, int pair) {
  return weights & isa::spread_signs(word << (7 - 2 * pair), word << (6 - 2 * pair), byte);
}

// Compute 8 weights as T: number i times scale(i), and +0 where byte `byte` of the word has no bit.
template <class T, class Scale>
MFT_DEVICE void select_eight(uint32_t (&pairs)[4], const float (&numbers)[8], const Scale& scale, uint32_t word,
                             int byte) {
  for (int i = 0; i < 8; i += 2) {
    const float low = isa::multiply(numbers[i], scale(i)), high = isa::multiply(numbers[i + 1], scale(i + 1));
    pairs[i / 2] = select_pair(isa::round_pair<T>(low, high), word, byte, i / 2);
  }
}

}  // namespace mft::cuda::sm80
