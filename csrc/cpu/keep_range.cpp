// From a threshold to the range of keys that are kept (see KeepRange).
#include "keep_range.h"

#include <cmath>
#include <cstring>

namespace mft {

int64_t infinity_key(Format format) {
  return format == Format::kFloat32 ? 0x7f800000 : format == Format::kBFloat16 ? 0x7f80 : 0x7c00;
}

int64_t least_key(Format format, bool magnitude) { return magnitude ? 0 : -infinity_key(format) - 1; }

double value_of_key(int64_t key, Format format, bool magnitude) {
  // Two's complement order: the negative value with magnitude bits m has the key ~m (so -0 is -1).
  const bool negative = !magnitude && key < 0;
  const uint32_t bits = static_cast<uint32_t>(negative ? ~key : key);
  double value;
  if (format == Format::kFloat16) {
    const int exponent = static_cast<int>(bits >> 10), fraction = static_cast<int>(bits & 0x3ff);
    if (exponent == 31) {
      value = fraction == 0 ? INFINITY : NAN;
    } else {
      value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    }
  } else {
    const uint32_t wide = format == Format::kBFloat16 ? bits << 16 : bits;
    float narrow;
    std::memcpy(&narrow, &wide, sizeof narrow);
    value = narrow;
  }
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
