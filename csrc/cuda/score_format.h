// Scores in memory and as fp32: fp32 itself, bf16, and 16-bit fixed point (sign and magnitude in steps of 2^-18).
//
// mft_kernels/reference/step.py (widen_scores, narrow_scores) defines them; the bits are the same.
#pragma once

#include "api.h"
#include "minifloat.h"

namespace mft::cuda {

template <ScoreFormat kFormat>
struct ScoreCodec;

template <>
struct ScoreCodec<ScoreFormat::kFloat32> {
  using Word = uint32_t;
  static constexpr bool kRounds = false;

  MFT_DEVICE static float widen(uint32_t word) { return isa::as_float(word); }
  MFT_DEVICE static uint32_t narrow(float value, uint32_t, uint32_t) { return isa::as_bits(value); }
  MFT_DEVICE static float sign(float value, uint32_t) { return value > 0 ? 1.0f : value < 0 ? -1.0f : 0.0f; }
};

// bf16 is rounded stochastically, by the lower half of a random word.
template <>
struct ScoreCodec<ScoreFormat::kBFloat16> {
  using Word = uint16_t;
  static constexpr bool kRounds = true;
  static constexpr uint32_t kInfinity = 0x7f80;

  MFT_DEVICE static float widen(uint32_t word) { return isa::as_float(word << 16); }

  MFT_DEVICE static uint32_t narrow(float value, uint32_t, uint32_t random) {
    const uint32_t bits = isa::as_bits(value);
    if ((bits & kFloatMagnitude) > kFloatInfinity) return 0x7fc0;
    return (bits + (random & 0xffff)) >> 16;  // an infinity's lower half is 0: nothing is carried
  }

  MFT_DEVICE static float sign(float value, uint32_t) { return value > 0 ? 1.0f : value < 0 ? -1.0f : 0.0f; }
};

template <>
struct ScoreCodec<ScoreFormat::kFixed16> {
  using Word = uint16_t;
  static constexpr bool kRounds = true;
  static constexpr uint32_t kInfinity = 0x7c00;
  static constexpr uint32_t kLargest = 0x7bff;

  MFT_DEVICE static float widen(uint32_t word) {
    const uint32_t magnitude = word & 0x7fff;
    const float value = isa::multiply(static_cast<float>(static_cast<int>(magnitude)), 0x1p-18f);
    const uint32_t bits = magnitude > kLargest ? 0x7fc00000 : isa::as_bits(value);
    return isa::as_float(bits | (word & 0x8000) << 16);
  }

  MFT_DEVICE static uint32_t narrow(float value, uint32_t old, uint32_t random) {
    const uint32_t bits = isa::as_bits(value), magnitude = bits & kFloatMagnitude;
    const float scaled = isa::multiply(isa::as_float(magnitude), 0x1p18f);
    const float q = scaled < 31743.0f ? scaled : 31743.0f;  // kLargest
    const int whole = static_cast<int>(q);
    const float rest = isa::multiply(isa::add(q, -static_cast<float>(whole)), 65536.0f);
    const uint32_t code = whole + (rest > static_cast<float>(static_cast<int>(random & 0xffff)) ? 1 : 0);
    // An exact 0 keeps the old sign; NaN has no sign.
    const uint32_t sign = magnitude == 0 ? old & 0x8000 : magnitude > kFloatInfinity ? 0 : bits >> 16 & 0x8000;
    return (magnitude < kFloatInfinity ? code : kInfinity) | sign;
  }

  // A 0 has the sign of its sign bit.
  MFT_DEVICE static float sign(float, uint32_t word) { return word & 0x8000 ? -1.0f : 1.0f; }
};

}  // namespace mft::cuda
