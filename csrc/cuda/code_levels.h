// What the codes of a quantised weight mean: the levels of NF4, and the scales of nf4 and int8.
//
//   nf4    w[i] = level[code[i]] * absmax[i / 64], i over the whole matrix; two codes per byte, the first in the high
//          bits. absmax may itself be stored as codes: absmax[j] = map[code[j]] * nested[j / 256] + offset
//   int8   w[n, k] = code[n, k] * (absmax[n] / 127)
//
// Computed in fp32 and rounded once to T, as mft_kernels/codes.py defines.
#pragma once

#include "isa.h"

namespace mft::cuda {

constexpr int kNf4Block = 64, kNestedBlock = 256;  // weights per absmax; absmax values per nested one

constexpr float kNf4Levels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Return a / 127, rounded to nearest. Every quotient is at least 1/254 of its last place away from a rounding boundary.
// So one correction by the remainder, which is exact, is enough. A plain division would be a function call in the
// loops.
MFT_DEVICE float over_127(float a) {
  constexpr float kInverse = 1.0f / 127;
  const float quotient = isa::multiply(a, kInverse), rest = isa::fused(-127.0f, quotient, a);
  return isa::magnitude(rest) > 0 ? isa::fused(rest, kInverse, quotient) : quotient;  // infinite quotient: rest is NaN
}

// Return an absmax of double quantisation, from its level and its own absmax.
MFT_DEVICE float nested_absmax(float level, float nested, float offset) {
  return isa::add(isa::multiply(level, nested), offset);
}

}  // namespace mft::cuda
