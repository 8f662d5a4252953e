// Scores as unsigned integers that order as they do, and the sum by which a rank is found among counts of them.
#pragma once

#include "isa.h"

namespace mft::cuda {

// Of a score's bits: without the sign (by magnitude), or with negative scores turned round (by value).
template <class Word>
MFT_DEVICE uint32_t key_of(uint32_t bits, bool magnitude) {
  constexpr uint32_t kSign = 1u << (8 * sizeof(Word) - 1), kAll = kSign | (kSign - 1);
  if (magnitude) return bits & (kSign - 1);
  return bits & kSign ? bits ^ kAll : bits | kSign;
}

template <class Word>
MFT_DEVICE uint32_t bits_of_key(uint32_t key, bool magnitude) {
  constexpr uint32_t kSign = 1u << (8 * sizeof(Word) - 1), kAll = kSign | (kSign - 1);
  if (magnitude) return key;
  return key & kSign ? key ^ kSign : key ^ kAll;
}

// Sum over this lane and those before it.
MFT_DEVICE uint32_t scan(uint32_t value, int lane) {
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const uint32_t other = isa::shuffle(value, (lane + 32 - by) % 32);
    if (lane >= by) value += other;
  }
  return value;
}

}  // namespace mft::cuda
