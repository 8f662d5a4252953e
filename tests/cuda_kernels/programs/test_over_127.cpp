// over_127 equals the division, for every mantissa of subnormal, smallest and ordinary numbers, and for infinity and
// NaN.
#include <cstdio>

#include "code_levels.h"

using namespace mft::cuda;

int main() {
  for (const uint32_t exponent : {0u, 1u, 127u}) {
    for (uint32_t bits = exponent << 23; bits < (exponent + 1) << 23; ++bits) {
      const float a = isa::as_float(bits);
      if (isa::as_bits(over_127(a)) != isa::as_bits(a / 127)) return std::printf("%08x\n", bits), 1;
    }
  }
  for (const uint32_t bits : {0x7f800000u, 0xff800000u, 0x80000000u, 0x80000001u, 0xbf9d3ab7u}) {
    const float a = isa::as_float(bits);
    if (isa::as_bits(over_127(a)) != isa::as_bits(a / 127)) return std::printf("%08x\n", bits), 1;
  }
  const float none = over_127(isa::as_float(0x7fc00000));
  return none == none;
}
