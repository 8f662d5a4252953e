// A mask in its weight's own memory: dropped values are kept aside, in row-major order, and the weight has 0 in their
// place.
#pragma once

#include <cstdint>

namespace mft {

// Bits of a mask over rows x columns elements, (columns + 31) / 32 words per row; 1: kept.
struct Bits {
  const uint32_t* words;
  int64_t rows, columns;

  int64_t row_words() const { return (columns + 31) / 32; }
  const uint32_t* row(int64_t r) const { return words + r * row_words(); }
  // Returns the elements of word w of row r that are dropped, as bits. Padding is never dropped.
  uint32_t dropped(int64_t r, int64_t w) const {
    const int64_t left = columns - 32 * w;
    return ~row(r)[w] & (left >= 32 ? ~0u : (1u << left) - 1);
  }
};

int64_t dropped_count(const Bits& bits);

// Writes the values that `bits` drops to `to`. The weight holds the mask `held`, with its dropped values in `aside`. If
// `aside` is nullptr, it holds no mask. Elements have 2 or 4 bytes.
void put_aside(void* to, const void* weight, int64_t element, const Bits& bits, const void* aside, const Bits& held);

// Writes the values of `aside` back to where `held` dropped them, except where `wanted` (may be nullptr) drops too.
void put_back(void* weight, int64_t element, const void* aside, const Bits& held, const Bits* wanted);

// Writes +0 where `bits` drops, except where `held` (may be nullptr) drops too: there is 0 already.
void drop(void* weight, int64_t element, const Bits& bits, const Bits* held);

}  // namespace mft
