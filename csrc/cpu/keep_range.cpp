// The range of keys that a threshold keeps (see KeepRange).
#include "keep_range.h"

#include <cmath>

namespace mft {

int64_t infinity_key(Format format) {
  return format == Format::kFloat32 ? 0x7f800000 : format == Format::kBFloat16 ? 0x7f80 : 0x7c00;
}

int64_t least_key(Format format, bool magnitude) { return magnitude ? 0 : -infinity_key(format) - 1; }

double value_of_key(int64_t key, Format format, bool magnitude) {
  // Two's complement order: the negative value with magnitude bits m has the key ~m (so -0 is -1).
  const bool negative = !magnitude && key < 0;
  const uint32_t bits = static_cast<uint32_t>(negative ? ~key : key);
  const uint32_t infinity = static_cast<uint32_t>(infinity_key(format));
  if (bits >= infinity) return bits > infinity ? NAN : negative ? -INFINITY : INFINITY;
  // Not computed in float: a processor that flushes subnormals to 0 would read them as 0. As doubles, all are normal.
  const int fraction_bits = format == Format::kFloat32 ? 23 : format == Format::kBFloat16 ? 7 : 10;
  const int bias = format == Format::kFloat16 ? 15 : 127;
  const int exponent = static_cast<int>(bits >> fraction_bits);
  const uint32_t one = 1u << fraction_bits, fraction = bits & (one - 1);
  const double significand = exponent == 0 ? fraction : one + fraction;
  const double value = std::ldexp(significand, (exponent == 0 ? 1 : exponent) - bias - fraction_bits);
  return negative ? -value : value;
}

KeepRange range_at_least(double threshold, Format format, bool magnitude) {
  // Values rise with keys, so the first key whose value reaches the threshold is found by bisection.
  const int64_t end = infinity_key(format) + 1;
  int64_t below = least_key(format, magnitude) - 1, reached = end;
  while (reached - below > 1) {
    const int64_t middle = below + (reached - below) / 2;
    if (value_of_key(middle, format, magnitude) >= threshold) {
      reached = middle;
    } else {
      below = middle;
    }
  }
  return {static_cast<uint32_t>(reached), static_cast<uint32_t>(end - reached), magnitude};
}

KeepRange range_positive(Format format) { return {1, static_cast<uint32_t>(infinity_key(format)), false}; }

KeepRange range_zero(Format) { return {0, 1, true}; }

}  // namespace mft
