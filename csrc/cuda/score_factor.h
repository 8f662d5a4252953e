// d_scores = [d_scores +] G [* weight] * sign(score): the arithmetic of one element, in the reference's order.
//
// G * weight is rounded to fp32 before the sign is applied. So accumulating into d_scores adds exactly the value that
// would replace it otherwise. A 16-bit d_scores is rounded once, to nearest even, after the addition. The sign of NaN
// is 0, as in torch.sign. A factor of 0 times an infinite product stays NaN.
#pragma once

#include "isa.h"
#include "keep.h"

namespace mft::cuda {

// Where signs come from: nowhere (all are 1), bits, 16-bit scores, fp32 scores.
enum class SignSource : int { kOne, kBits, kHalves, kFloats };

MFT_DEVICE float sign_of(float score) { return static_cast<float>((score > 0.0f) - (score < 0.0f)); }

// half: the bits of a score. infinity: the bits of its type's infinity, which only NaN exceeds.
MFT_DEVICE float sign_of_half(uint32_t half, uint32_t infinity) {
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude == 0 || magnitude > infinity) return 0.0f;
  return isa::as_float(0x3f800000u | (half & 0x8000) << 16);
}

// +1 if bit `position` is set, else -1.
MFT_DEVICE float sign_of_bit(uint32_t word, int position) {
  return isa::as_float(0x3f800000u | (~word << (31 - position) & 0x80000000u));
}

// The same, as a factor: return value or -value.
MFT_DEVICE float signed_by_bit(float value, uint32_t word, int position) {
  return isa::as_float(isa::as_bits(value) ^ (~word << (31 - position) & 0x80000000u));
}

template <class T>
MFT_DEVICE float low_of(uint32_t pair) {
  return isa::widen(T{static_cast<uint16_t>(pair & 0xffff)});
}

template <class T>
MFT_DEVICE float high_of(uint32_t pair) {
  return isa::widen(T{static_cast<uint16_t>(pair >> 16)});
}

MFT_DEVICE float product(float g, float weight) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(g, weight);  // never fused with an addition
#else
  return g * weight;
#endif
}

MFT_DEVICE float score_gradient(float g, float weight, float sign) { return product(g, weight) * sign; }

// The value that is added if d_scores is not accumulated: -0 changes no value, not even -0.
constexpr float kNothing = -0.0f;

MFT_DEVICE float accumulated(float value, float before) { return value + before; }

}  // namespace mft::cuda
