// Compare the emulator's conversions of 16-bit floats with those of CUDA's headers on the host.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <random>

#include "isa.h"

using namespace mft::cuda;

namespace {

int mistakes = 0;

uint16_t cuda_rounds(BFloat16, float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
uint16_t cuda_rounds(Float16, float value) { return __half_as_ushort(__float2half_rn(value)); }
float cuda_widens(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
float cuda_widens(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T>
void check_round(uint32_t bits) {
  const float value = isa::as_float(bits);
  const uint32_t got = isa::round_to<T>(value).bits, expected = cuda_rounds(T{}, value);
  const uint32_t one = isa::round_to<T>(1.0f).bits, pair = isa::round_pair<T>(value, 1.0f);
  if (got == expected && pair == (got | one << 16)) return;
  if (++mistakes <= 10) std::printf("%08x: rounds to %04x, expected %04x\n", bits, got, expected);
}

template <class T>
void check() {
  for (uint32_t i = 0; i < 1 << 16; ++i) {
    const T value{static_cast<uint16_t>(i)};
    const uint32_t got = isa::as_bits(isa::widen(value)), expected = isa::as_bits(cuda_widens(value));
    const bool nan = std::isnan(isa::widen(value));
    if (nan ? !std::isnan(cuda_widens(value)) : got != expected) {
      if (++mistakes <= 10) std::printf("%04x: widens to %08x, expected %08x\n", i, got, expected);
    }
    // The value, the midpoint between it and the next value, and their neighbours.
    const uint32_t next = isa::as_bits(isa::widen(T{static_cast<uint16_t>(i + 1)}));
    const uint32_t middle = got + (next - got) / 2;
    for (uint32_t step = 0; step < 5; ++step) {
      check_round<T>(got + step - 2);
      check_round<T>(middle + step - 2);
    }
  }
  std::mt19937 random(0);
  for (int i = 0; i < 10'000'000; ++i) check_round<T>(random());
}

}  // namespace

int main() {
  check<BFloat16>();
  check<Float16>();
  std::printf("%d mistakes\n", mistakes);
  return mistakes != 0;
}
