// A mask in its weight's own memory: what is dropped lies aside, in row-major order, and 0 in its place.
#pragma once

#include <cstdint>

namespace mft {

// Bits of a mask over rows x columns elements, (columns + 31) / 32 words a row; 1: kept.
struct Bits {
  const uint32_t* words;
  int64_t rows, columns;

  int64_t row_words() const { return (columns + 31) / 32; }
  const uint32_t* row(int64_t r) const { return words + r * row_words(); }
  // Of word w of row r, the elements that are dropped; what pads the row is none.
  uint32_t dropped(int64_t r, int64_t w) const {
    const int64_t left = columns - 32 * w;
    return ~row(r)[w] & (left >= 32 ? ~0u : (1u << left) - 1);
  }
};

int64_t dropped_count(const Bits& bits);

// to: what `bits` drops of a weight that holds the mask `held` with `aside`, or none where aside is nullptr.
// Elements are of 2 or 4 bytes.
void put_aside(void* to, const void* weight, int64_t element, const Bits& bits, const void* aside, const Bits& held);

// aside goes to where `held` dropped it from, but for what `wanted`, if any, drops as well.
void put_back(void* weight, int64_t element, const void* aside, const Bits& held, const Bits* wanted);

// +0 where `bits` drops, but for what `held`, if any, drops as well: 0 lies there.
void drop(void* weight, int64_t element, const Bits& bits, const Bits* held);

}  // namespace mft
