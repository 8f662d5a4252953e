// Compare keep.h, in both halves of a register and for every 16-bit score, with the comparison of floats.
#include <cstdio>
#include <random>
#include <vector>

#include "keep.h"

using namespace mft::cuda;

namespace {

constexpr int kScores = 1 << 16;
int mistakes = 0;

template <class T>
float value_of(uint32_t bits) {
  return isa::widen(T{static_cast<uint16_t>(bits)});
}

// Zeros, the ends of the subnormals, 1, the largest number, infinities and NaN, of both signs, and their neighbours;
// then random ones.
template <class T>
std::vector<uint32_t> thresholds() {
  const uint32_t smallest_normal = std::is_same_v<T, BFloat16> ? 0x0080 : 0x0400;
  const uint32_t one = std::is_same_v<T, BFloat16> ? 0x3f80 : 0x3c00;
  std::vector<uint32_t> found;
  for (const uint32_t m : {0u, 2u, smallest_normal, one, kInfinity<T> - 1, kInfinity<T> + 1, 0x7fffu}) {
    for (const uint32_t sign : {0u, 0x8000u}) {
      for (const int step : {-1, 0, 1}) {
        const uint32_t near = m + static_cast<uint32_t>(step);
        if (near < 0x8000) found.push_back(sign | near);
      }
    }
  }
  std::mt19937 random(0);
  for (int i = 0; i < 200; ++i) found.push_back(random() & 0xffff);
  return found;
}

template <class T, bool kMagnitude>
std::vector<bool> kept(uint32_t threshold) {
  std::vector<bool> keep(kScores);
  for (uint32_t s = 0; s < kScores; ++s) {
    const float score = value_of<T>(s);
    keep[s] = (kMagnitude ? std::fabs(score) : score) >= value_of<T>(threshold);
  }
  return keep;
}

template <class T, bool kMagnitude>
void check() {
  const std::vector<uint32_t> all = thresholds<T>();
  for (size_t i = 0; i < all.size(); ++i) {
    const uint32_t low = all[i], high = all[(i * 7 + 3) % all.size()];
    const std::vector<bool> keep_low = kept<T, kMagnitude>(low), keep_high = kept<T, kMagnitude>(high);
    const auto keep = KeepPair<T, kMagnitude>::of(low | high << 16);
    for (uint32_t s = 0; s < kScores; ++s) {
      // Each neighbour takes all values of a score, as s does.
      for (const uint32_t neighbour : {s, s ^ 0x8000, (s * 40503u + 12345u) & 0xffff, 0xffff - s}) {
        const uint32_t pair = s | neighbour << 16;
        const uint32_t expected = (keep_low[s] ? 0x8000u : 0) | (keep_high[neighbour] ? 0x80000000u : 0);
        const uint32_t weights = 0x7fc1fff5;
        const uint32_t selected = weights & ((keep_low[s] ? 0xffffu : 0) | (keep_high[neighbour] ? 0xffff0000u : 0));
        if ((keep.bits(pair) & kSigns) == expected && keep.select(weights, pair) == selected) continue;
        if (++mistakes <= 10) {
          std::printf("scores %08x, thresholds %04x%04x, %s: got %08x, expected %08x\n", pair, high, low,
                      kMagnitude ? "magnitude" : "value", keep.bits(pair) & kSigns, expected);
        }
      }
    }
  }
}

void check_fp32() {
  const float values[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, -NAN};
  for (const float score : values) {
    for (const float threshold : values) {
      mistakes += keeps<true>(score, threshold) != (std::fabs(score) >= threshold);
      mistakes += keeps<false>(score, threshold) != (score >= threshold);
    }
  }
}

}  // namespace

int main() {
  check<BFloat16, true>();
  check<BFloat16, false>();
  check<Float16, true>();
  check<Float16, false>();
  check_fp32();
  std::printf("%d mistakes\n", mistakes);
  return mistakes != 0;
}
