// Scores as unsigned integers with the same order (keys), and the prefix sum that finds a rank among counts of keys.
#pragma once

#include "isa.h"

namespace mft::cuda {

// Return the key of a score's bits: without the sign (by magnitude), or with negative scores reversed (by value).
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

// Return the sum over this lane and those before it.
MFT_DEVICE uint32_t scan(uint32_t value, int lane) {
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const uint32_t other = isa::shuffle(value, (lane + 32 - by) % 32);
    if (lane >= by) value += other;
  }
  return value;
}

}  // namespace mft::cuda
