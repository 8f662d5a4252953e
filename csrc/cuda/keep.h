// keep(scores): compute the mask of two weights from a threshold and two 16-bit scores, in integer arithmetic.
//
// A 16-bit float is sign and magnitude m, and m orders like |value|: infinity is `infinity`, NaN lies above it. For two
// scores in a register, m + c carries into bit 15 of its half (and never out of it) exactly if m >= 0x8000 - c. So a
// comparison is one addition, and another addition finds NaN:
//
//   magnitude:  m >= low and not m > infinity
//   value:      s < 0 ? m <= high : m >= low and not m > infinity
//
// This equals the reference in every corner case: NaN scores and thresholds keep nothing, -0 equals +0, infinities and
// subnormals are ordinary values. fp32 scores are compared as floats, which gives the same result.
#pragma once

#include "isa.h"

namespace mft::cuda {

constexpr uint32_t kSigns = 0x80008000u;

template <class T>
inline constexpr uint32_t kInfinity = 0;
template <>
inline constexpr uint32_t kInfinity<BFloat16> = 0x7f80;
template <>
inline constexpr uint32_t kInfinity<Float16> = 0x7c00;

// The comparison with one threshold (or with two, one for each half).
template <class T, bool kMagnitude>
struct KeepPair {
  uint32_t low, high;  // added to m: low carries if m >= least; high carries if m >= below_most (value mode only)

  // thresholds: the bits of two thresholds.
  MFT_DEVICE static KeepPair of(uint32_t thresholds) {
    const KeepPair first = of_one(thresholds & 0xffff), second = of_one(thresholds >> 16);
    return {first.low | second.low << 16, first.high | second.high << 16};
  }

  // Return whether the scores in the lower and upper half are kept, in bit 15 and bit 31.
  template <class Register>
  MFT_DEVICE Register bits(Register scores) const {
    constexpr uint32_t kNotANumber = 0x7fff - kInfinity<T>;
    const Register m = scores & ~kSigns;
    const Register kept = (m + low) & ~(m + (kNotANumber | kNotANumber << 16));
    if constexpr (kMagnitude) return kept;
    return (scores & ~(m + high)) | (~scores & kept);
  }

  // Return the two weights, with +0 where the score drops one.
  template <class Register>
  MFT_DEVICE Register select(Register weights, Register scores) const {
    return weights & isa::spread_signs(bits(scores));
  }

 private:
  MFT_DEVICE static KeepPair of_one(uint32_t t) {
    const uint32_t m = t & 0x7fff;
    const bool negative = t >> 15, nan = m > kInfinity<T>;
    if constexpr (kMagnitude) {
      const uint32_t least = nan ? kInfinity<T> + 1 : negative ? 0 : m;
      return {0x8000 - least, 0};
    } else {
      // t > 0 keeps no negative score; t <= 0 keeps every positive one, and the negative ones up to |t|.
      const bool above_zero = !negative && m != 0;
      const uint32_t least = nan ? kInfinity<T> + 1 : above_zero ? m : 0;
      const uint32_t below_most = nan || above_zero ? 0 : m + 1;  // negative scores need m < below_most
      return {0x8000 - least, 0x8000 - below_most};
    }
  }
};

// Return whether one fp32 score is kept.
template <bool kMagnitude>
MFT_DEVICE bool keeps(float score, float threshold) {
  return (kMagnitude ? isa::magnitude(score) : score) >= threshold;
}

}  // namespace mft::cuda
