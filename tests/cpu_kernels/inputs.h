// The inputs of checksums.cpp and the checksums of results: the same bits on every processor.
#pragma once

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "row_kernels.h"

namespace inputs {

using mft::Format;

constexpr Format kFormats[] = {Format::kFloat32, Format::kBFloat16, Format::kFloat16};
inline const char* name_of(Format f) {
  return f == Format::kFloat32 ? "fp32" : f == Format::kBFloat16 ? "bf16" : "fp16";
}

struct Layout {
  int fraction, bias;
  uint32_t infinity, sign;
};

constexpr Layout layout_of(Format f) {
  return f == Format::kFloat32    ? Layout{23, 127, 0x7f800000, 0x80000000}
         : f == Format::kBFloat16 ? Layout{7, 127, 0x7f80, 0x8000}
                                  : Layout{10, 15, 0x7c00, 0x8000};
}

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }

 private:
  uint64_t state_;
};

// Memory that begins `shift` elements behind a cache line, and ends at a margin that no kernel may write to.
class Memory {
 public:
  Memory(int64_t elements, int width, int64_t shift = 0)
      : width_(width), elements_(elements), bytes_(static_cast<size_t>(elements * width) + 256, '\x5a') {
    const auto start = reinterpret_cast<uintptr_t>(bytes_.data());
    first_ = bytes_.data() + (64 - start % 64) % 64 + shift * width;
  }
  Memory(const Memory&) = delete;
  void* data() const { return first_; }
  template <typename T>
  T* as() const { return static_cast<T*>(data()); }
  int64_t elements() const { return elements_; }
  int width() const { return width_; }
  bool margin_is_whole() const {
    const char* end = first_ + elements_ * width_;
    for (int64_t i = 0; i < 64; ++i) {
      if (end[i] != '\x5a') return false;
    }
    return true;
  }

  uint32_t get(int64_t i) const {
    return width_ == 4 ? as<uint32_t>()[i] : width_ == 2 ? as<uint16_t>()[i] : as<uint8_t>()[i];
  }
  void set(int64_t i, uint32_t bits) const {
    if (width_ == 4) as<uint32_t>()[i] = bits;
    if (width_ == 2) as<uint16_t>()[i] = static_cast<uint16_t>(bits);
    if (width_ == 1) as<uint8_t>()[i] = static_cast<uint8_t>(bits);
  }

 private:
  int width_;
  int64_t elements_;
  std::vector<char> bytes_;
  char* first_;
};

// A number of either sign, within `spread` powers of two below 1.
inline uint32_t moderate(Random& random, Format f, int spread = 12) {
  const Layout l = layout_of(f);
  const auto exponent = static_cast<uint32_t>(l.bias - 1 - random.below(spread));
  const auto rest = static_cast<uint32_t>(random.next()) & (l.sign | ((1u << l.fraction) - 1));
  return rest | exponent << l.fraction;
}

// A special number with probability 1 / `rarity`, else a moderate one. Special numbers are zeros, infinities, NaN of
// either sign, subnormals and the largest number.
inline uint32_t odd(Random& random, Format f, int rarity = 6) {
  if (random.below(rarity) != 0) return moderate(random, f);
  const Layout l = layout_of(f);
  const uint32_t values[] = {0, l.infinity, l.infinity + 1, l.infinity | l.infinity >> 1 | 1, 1, (1u << l.fraction) - 1,
                             1u << l.fraction, l.infinity - 1};
  return values[random.below(8)] | (random.below(2) != 0 ? l.sign : 0);
}

// An integer from -`most` to `most`; `most` is at most 7.
inline uint32_t integer(Random& random, Format f, int most) {
  const int64_t value = random.below(2 * most + 1) - most;
  const Layout l = layout_of(f);
  const auto magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
  if (magnitude == 0) return 0;
  const int exponent = magnitude >= 4 ? 2 : magnitude >= 2 ? 1 : 0;
  const uint32_t fraction = (magnitude << l.fraction >> exponent) & ((1u << l.fraction) - 1);
  return (value < 0 ? l.sign : 0) | static_cast<uint32_t>(l.bias + exponent) << l.fraction | fraction;
}

// The bits of an fp32 number halfway between two neighbours in 16 bits, or next to that.
inline uint32_t near_tie(Random& random, Format f) {
  const Layout l = layout_of(f);
  const bool large = random.below(4) == 0;
  const auto magnitude = static_cast<uint32_t>(large ? l.infinity - 1 - random.below(4) : random.below(l.infinity));
  const uint32_t fraction = magnitude & ((1u << l.fraction) - 1), exponent = magnitude >> l.fraction;
  const double whole = exponent == 0 ? fraction : fraction + (1u << l.fraction);
  const int scale = static_cast<int>(exponent == 0 ? 1 : exponent) - l.bias - l.fraction;
  const auto tie = static_cast<float>(std::ldexp(whole + 0.5, scale));
  uint32_t bits;
  std::memcpy(&bits, &tie, sizeof bits);
  return (bits + static_cast<uint32_t>(random.below(3)) - 1) | (random.below(2) != 0 ? 0x80000000 : 0);
}

template <typename Make>
void fill(const Memory& memory, Make make) {
  for (int64_t i = 0; i < memory.elements(); ++i) memory.set(i, make());
}

// FNV-1a. All NaNs count as equal: which NaN a sum of two gives depends on the processor.
class Checksum {
 public:
  void add(uint64_t value) {
    for (int byte = 0; byte < 8; ++byte) hash_ = (hash_ ^ (value >> (8 * byte) & 0xff)) * 0x100000001b3;
  }
  void add_bits(const Memory& memory) {
    for (int64_t i = 0; i < memory.elements(); ++i) add(memory.get(i));
    add(memory.margin_is_whole());
  }
  void add_numbers(const Memory& memory, Format f) {
    const Layout l = layout_of(f);
    for (int64_t i = 0; i < memory.elements(); ++i) {
      const uint32_t bits = memory.get(i);
      add((bits & ~l.sign) > l.infinity ? l.infinity + 1 : bits);
    }
    add(memory.margin_is_whole());
  }
  void print(const std::string& what) const { std::printf("%016" PRIx64 "  %s\n", hash_, what.c_str()); }

 private:
  uint64_t hash_ = 0xcbf29ce484222325;
};

}  // namespace inputs
