// Check score_factor.h against statements: every 16-bit score, edge cases of fp32, sign bits, both ways to write
// d_scores.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "score_factor.h"

namespace {

using namespace mft::cuda;

int failures = 0;

void expect(bool holds, const char* what, double x = 0, double y = 0) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED: %s (%.9g, %.9g)\n", what, x, y);
}

bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, 4) == 0; }

// Return the value of the bits of a float with `exponent_bits`, from the definition of the format.
double meaning(unsigned bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = (bits & ((1u << fraction_bits) - 1)) / std::pow(2.0, fraction_bits);
  double value = exponent == 0 ? std::pow(2.0, 1 - bias) * fraction : std::pow(2.0, exponent - bias) * (1 + fraction);
  if (exponent == (1 << exponent_bits) - 1) {
    value = fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  return bits & 0x8000 ? -value : value;
}

double sign(double value) { return value > 0 ? 1 : value < 0 ? -1 : 0; }  // like torch.sign: 0 for NaN

template <class T>
void halves(int exponent_bits, const char* name) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const double value = meaning(bits, exponent_bits);
    expect(sign_of_half(bits, kInfinity<T>) == sign(value), name, bits, value);
    const unsigned other = bits ^ 0x5a5a;
    expect(same(low_of<T>(bits | other << 16), static_cast<float>(value)), "low half", bits, value);
    expect(same(high_of<T>(other | bits << 16), static_cast<float>(value)), "high half", bits, value);
  }
}

void floats() {
  const float inf = std::numeric_limits<float>::infinity(), least = std::numeric_limits<float>::denorm_min();
  for (float score : {0.0f, least, 1e-39f, std::numeric_limits<float>::min(), 1.0f, 3e38f, inf}) {
    expect(sign_of(score) == (score == 0 ? 0.0f : 1.0f), "sign of an fp32 score", score);
    expect(sign_of(-score) == (score == 0 ? 0.0f : -1.0f), "sign of a negative fp32 score", score);
  }
  expect(sign_of(std::nanf("")) == 0 && sign_of(-std::nanf("")) == 0, "sign of NaN");
}

void bits() {
  for (int position = 0; position < 32; ++position) {
    const uint32_t one = 1u << position;
    for (uint32_t others : {0u, 0xffffffffu, 0xa5a5a5a5u}) {
      expect(sign_of_bit(others | one, position) == 1.0f, "set bit", position, others);
      expect(sign_of_bit(others & ~one, position) == -1.0f, "clear bit", position, others);
      for (float value : {0.0f, -0.0f, 1.5f, -1e-40f}) {
        expect(same(signed_by_bit(value, others | one, position), value), "set bit", position, value);
        expect(same(signed_by_bit(value, others & ~one, position), -value), "clear bit", position, value);
      }
    }
  }
}

// Return the nearest finite value of the format, the even one if two are equally near; infinity from half a step above
// the largest.
double nearest(double value, int exponent_bits) {
  const unsigned infinity = ((1u << exponent_bits) - 1) << (15 - exponent_bits);
  const double magnitude = std::fabs(value);
  unsigned low = 0, high = infinity - 1;  // meaning() increases with the bits
  while (low < high) {
    const unsigned middle = (low + high + 1) / 2;
    if (meaning(middle, exponent_bits) <= magnitude) low = middle;
    else high = middle - 1;
  }
  const double below = meaning(low, exponent_bits);
  const double above = low + 1 < infinity ? meaning(low + 1, exponent_bits)
                                          : 2 * below - meaning(low - 1, exponent_bits);
  const double to_below = magnitude - below, to_above = above - magnitude;
  const bool up = to_above < to_below || (to_above == to_below && low % 2 == 1);
  const double rounded = !up ? below : low + 1 < infinity ? above : std::numeric_limits<double>::infinity();
  return std::signbit(value) ? -rounded : rounded;
}

template <class T>
void gradients(int exponent_bits, const char* name) {
  const float gs[] = {0.0f, -0.0f, 1.0f, 1.0f / 3, -2.7182817f, 1e-30f, 65519.0f, 3e38f};
  const unsigned weights[] = {0x0000, 0x8000, 0x0001, 0x3c01, 0x3f81, 0xbdcd, 0x7bff};
  for (float g : gs) {
    for (unsigned bits : weights) {
      const float weight = low_of<T>(bits);
      for (float s : {-1.0f, 0.0f, 1.0f}) {
        const auto exact = static_cast<float>(static_cast<double>(g) * meaning(bits, exponent_bits));
        const float expected = s == 0 ? exact * 0.0f : s < 0 ? -exact : exact;
        const float value = score_gradient(g, weight, s);
        expect(same(value, expected), "product", value, expected);
        // kNothing is -0: adding it keeps the value.
        for (float old : {-0.0f, 0.0f, 1.0f, -0.01f, 0.50048828f}) {
          const float sum = accumulated(value, old);
          const float expected_sum = static_cast<float>(static_cast<double>(expected) + old);
          expect(same(sum, expected_sum), "accumulated", sum, expected_sum);
          const uint32_t pair = isa::round_pair<T>(sum, -sum);
          if (std::isnan(sum)) continue;
          expect(meaning(pair & 0xffff, exponent_bits) == nearest(sum, exponent_bits), name, sum, old);
          expect(meaning(pair >> 16, exponent_bits) == nearest(-sum, exponent_bits), name, -sum, old);
        }
        expect(same(accumulated(value, kNothing), value), "nothing added", value);
      }
    }
  }
  // Ties, and values just below and just above, across a binade and into the subnormals and infinity.
  const unsigned infinity = kInfinity<T>;
  for (unsigned bits = 0; bits + 1 < infinity; bits += bits < 64 || bits + 66 > infinity ? 1 : 61) {
    const auto below = static_cast<float>(meaning(bits, exponent_bits));
    const auto above = static_cast<float>(meaning(bits + 1, exponent_bits));
    const float tie = below / 2 + above / 2;
    for (float x : {below, tie, std::nextafter(tie, 0.0f), std::nextafter(tie, above)}) {
      const double rounded = meaning(isa::round_pair<T>(x, 0.0f) & 0xffff, exponent_bits);
      expect(rounded == nearest(x, exponent_bits), name, x, rounded);
    }
  }
}

void infinities() {
  const float inf = std::numeric_limits<float>::infinity();
  expect(std::isnan(score_gradient(inf, 1.0f, 0.0f)), "0 times an infinite product is NaN");
  expect(score_gradient(inf, -2.0f, -1.0f) == inf, "the sign applies to an infinite product");
  expect(std::isnan(product(std::nanf(""), 1.0f)), "NaN stays");
  // The product and the sum round separately: in a fused multiply-add, 0.1f * 0.1f - round(0.1f * 0.1f) is not 0.
  const float rounded = 0.1f * 0.1f;
  expect(accumulated(product(0.1f, 0.1f), -rounded) == 0.0f, "the product is rounded before the sum");
}

}  // namespace

int main() {
  halves<BFloat16>(8, "sign of a bf16 score");
  halves<Float16>(5, "sign of an fp16 score");
  floats();
  bits();
  gradients<BFloat16>(8, "rounded to bf16");
  gradients<Float16>(5, "rounded to fp16");
  infinities();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
