// What the codes of a quantised weight mean: NF4's levels and the scales of both kinds.
//
//   nf4    w[i] = level[code[i]] * absmax[i / 64], i over the whole matrix; two codes a byte, the first in the high bits;
//          absmax may be codes itself: map[code] * nested[code's place / 256] + offset
//   int8   w[n, k] = code[n, k] * (absmax[n] / 127)
//
// in fp32 and rounded once to T, as mft_kernels/codes.py says.
#pragma once

#include "isa.h"

namespace mft::cuda {

constexpr int kNf4Block = 64, kNestedBlock = 256;  // weights of an absmax; absmax of a nested one

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

// a / 127, rounded to nearest. No quotient lies nearer than 1/254 of its last place to where rounding turns, so that
// one correction by the rest, which is exact, suffices; the division in its place is a function that loops call.
MFT_DEVICE float over_127(float a) {
  constexpr float kInverse = 1.0f / 127;
  const float quotient = isa::multiply(a, kInverse), rest = isa::fused(-127.0f, quotient, a);
  return isa::magnitude(rest) > 0 ? isa::fused(rest, kInverse, quotient) : quotient;  // an infinite one leaves NaN
}

// An absmax of double quantisation, from its own level and absmax.
MFT_DEVICE float nested_absmax(float level, float nested, float offset) {
  return isa::add(isa::multiply(level, nested), offset);
}

}  // namespace mft::cuda
