// Moments in 8 bits: minifloats of 3 mantissa bits, with a scale for each block of 256 elements.
//
//   kCodes 128   seeeemmm   exp_avg, whose largest code stands for 1.875 with a bias of 15
//   kCodes 256   eeeeemmm   exp_avg_sq, the same with a bias of 31
//
// mft_kernels/reference/step.py (decode, encode) defines both; the bits are the same.
#pragma once

#include "isa.h"

namespace mft::cuda {

constexpr uint32_t kFloatInfinity = 0x7f800000, kFloatMagnitude = 0x7fffffff;

// How one block is coded.
struct Coding {
  float scale;    // what 1 stands for
  float inverse;  // 1.875 / largest
  bool coded;     // else every code is 0: the block's largest is below 2^-125, or NaN

  // top: the largest bit pattern of the block's magnitudes. Patterns order like their values, with NaN above all.
  MFT_DEVICE static Coding of(uint32_t top) {
    constexpr uint32_t kLeast = 2u << 23, kMost = 253u << 23;  // 2^-125 and 2^126
    if (top < kLeast) return {0, 0, false};
    if (top > kFloatInfinity) return {isa::as_float(0x7fc00000), 0, false};
    const float largest = isa::as_float(top < kMost ? top : kMost);
    return {isa::divide(largest, 1.875f), isa::divide(1.875f, largest), true};
  }
};

template <int kBias, int kCodes>
struct Minifloat {
  MFT_DEVICE static float decode(uint32_t code, float scale) {
    const uint32_t magnitude = code & (kCodes - 1);
    const float least = isa::as_float(uint32_t{125 - kBias} << 23);  // 2^(-2 - bias)
    const uint32_t normal = (magnitude + ((127 - kBias) << 3)) << 20;
    const uint32_t subnormal = isa::as_bits(isa::multiply(static_cast<float>(static_cast<int>(magnitude)), least));
    const uint32_t sign = (code & 0xff & ~(kCodes - 1)) << 24;
    return isa::multiply(isa::as_float((magnitude < 8 ? subnormal : normal) | sign), scale);
  }

  // random: its lowest 8 bits decide the rounding.
  MFT_DEVICE static uint32_t encode(float value, const Coding& coding, uint32_t random) {
    if (!coding.coded) return 0;
    const uint32_t bits = isa::as_bits(value), magnitude = bits & kFloatMagnitude;
    const float y = isa::multiply(isa::as_float(magnitude), coding.inverse);
    const float least = isa::as_float(uint32_t{128 - kBias} << 23);  // 2^(1 - bias), the least normal one
    const float steps = isa::as_float(uint32_t{149 + kBias} << 23);  // 2^(22 + bias)
    const float low = y < least ? y : least;
    const uint32_t subnormal = static_cast<uint32_t>(isa::multiply(low, steps));
    const uint32_t fixed = y < least ? subnormal : isa::as_bits(y) - (uint32_t{127 - kBias} << 23);
    uint32_t code = (fixed + ((random & 0xff) << 12) + 2048) >> 20;
    code = code < kCodes - 1 ? code : kCodes - 1;
    if constexpr (kCodes == 128) return code | (bits >> 24 & 0x80);
    return code == 0 && magnitude != 0 ? 1 : code;  // a positive square stays positive
  }
};

}  // namespace mft::cuda
