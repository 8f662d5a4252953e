// The exact k-th largest score without a sort (select.h).
#include "select.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>

#include "capability.h"
#include "keep_range.h"
#include "parallel.h"

namespace mft {
namespace {

constexpr int64_t kBins = 1 << 16;
constexpr int64_t kChunk = 1 << 18;  // elements that a thread takes at a time for a histogram
constexpr int64_t kCoarse = 4096;    // bins for the keys within a window
constexpr int64_t kPart = 4096;      // elements whose keys are collected at once

// visit(typed scores, std::integral_constant<bool, magnitude>)
template <typename Visit>
auto with_type(const void* scores, Format format, bool magnitude, const Visit& visit) {
  if (format == Format::kFloat32) {
    auto* s = static_cast<const uint32_t*>(scores);
    return magnitude ? visit(s, std::true_type{}) : visit(s, std::false_type{});
  }
  auto* s = static_cast<const uint16_t*>(scores);
  return magnitude ? visit(s, std::true_type{}) : visit(s, std::false_type{});
}

// ------------------------------------------------------------------------------------------------ a window

// The key that keep_bits() computes.
template <bool kMagnitude, typename Bits>
inline int64_t key_of(Bits bits) {
  using Signed = std::make_signed_t<Bits>;
  constexpr auto kMagnitudeBits = static_cast<Signed>(static_cast<Bits>(~Bits{0}) >> 1);
  const auto value = static_cast<Signed>(bits);
  return kMagnitude || value >= 0 ? value & kMagnitudeBits : static_cast<Signed>(value ^ kMagnitudeBits);
}

uint32_t bits_of_key(int64_t key, Format format) {
  const int64_t magnitude_bits = format == Format::kFloat32 ? 0x7fffffff : 0x7fff;
  const int64_t all_bits = 2 * magnitude_bits + 1;
  return static_cast<uint32_t>((key < 0 ? key ^ magnitude_bits : key) & all_bits);
}

uint32_t nan_of(Format format) {
  return format == Format::kFloat32 ? 0x7fc00000 : format == Format::kBFloat16 ? 0x7fc0 : 0x7e00;
}

// Above this, histograms are less work.
int64_t most_inside(int64_t n) { return std::max(n / 12, int64_t{1} << 14); }

// Returns keys between which the k-th largest lies, unless a random sample is off by more than 3 standard deviations.
Keys sampled_keys(const void* scores, Format format, int64_t n, int64_t k, bool magnitude) {
  constexpr int64_t kRun = 4;  // neighbours of one cache line
  const int64_t runs = n / kRun <= 256 ? n / kRun : std::clamp(n / 1024, int64_t{256}, int64_t{8192});
  std::vector<int64_t> keys;
  with_type(scores, format, magnitude, [&](auto* s, auto is_magnitude) {
    for (int64_t run = 0; run < runs; ++run) {
      const auto place = static_cast<uint64_t>(run) * 0x9E3779B97F4A7C15 >> 20;  // spread evenly, with no period
      const int64_t first = runs * kRun < n ? static_cast<int64_t>(place % static_cast<uint64_t>(n - kRun)) : run * kRun;
      for (int64_t i = first; i < first + kRun; ++i) keys.push_back(key_of<is_magnitude.value>(s[i]));
    }
  });
  if (keys.empty()) return {least_key(format, magnitude), infinity_key(format)};  // at most 3 scores
  const double share = static_cast<double>(k) / static_cast<double>(n), size = static_cast<double>(keys.size());
  const auto middle = static_cast<int64_t>(share * size);
  const auto off = static_cast<int64_t>(3 * std::sqrt(size * share * (1 - share))) + 2;
  const auto ranked = [&](int64_t rank) {
    std::nth_element(keys.begin(), keys.begin() + rank, keys.end(), std::greater<>());
    return keys[rank];
  };
  const int64_t high = middle - off < 0 ? infinity_key(format) : ranked(middle - off);
  const bool ends = middle + off >= static_cast<int64_t>(keys.size());
  return {ends ? least_key(format, magnitude) : ranked(middle + off), high};
}

// ------------------------------------------------------------------------------------------------ histograms

using Histogram = std::vector<int64_t>;

constexpr int lower_bit_count(bool wide, bool magnitude) { return !wide ? 0 : magnitude ? 15 : 16; }

// Returns the bin that holds the k-th largest. k becomes its rank within the bin.
int64_t bin_of_rank(const Histogram& bins, int64_t& k) {
  auto bin = static_cast<int64_t>(bins.size()) - 1;
  while (bin > 0 && bins[bin] < k) k -= bins[bin--];
  return bin;
}

// Calls count(begin, end, bins) for all chunks of [0, n), on all threads, and returns the sum of the bins.
template <typename Count>
Histogram histogram(int64_t n, const Count& count) {
  Histogram total(kBins, 0);
  std::mutex merging;
  std::atomic<int64_t> next{0};
  parallel_for(0, num_threads(), 1, [&](int64_t, int64_t) {
    std::unique_ptr<uint32_t[]> bins(new uint32_t[kBins]());
    int64_t counted = 0;
    const auto merge = [&] {
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t b = 0; b < kBins; ++b) total[b] += bins[b];
      std::fill(bins.get(), bins.get() + kBins, 0u);
      counted = 0;
    };
    for (int64_t begin; (begin = next.fetch_add(kChunk)) < n;) {
      const int64_t end = begin + kChunk < n ? begin + kChunk : n;
      count(begin, end, bins.get());
      if ((counted += end - begin) > (int64_t{1} << 31)) merge();
    }
    if (counted > 0) merge();
  });
  return total;
}

// kth_largest() of finite scores, 1 <= k.
uint32_t kth_largest_by_histograms(const void* scores, Format format, int64_t n, int64_t k, bool magnitude) {
  const int64_t least = magnitude ? 0 : format == Format::kFloat32 ? -(int64_t{1} << 31) : -(1 << 15);
  const int shift = lower_bit_count(format == Format::kFloat32, magnitude);
  return with_type(scores, format, magnitude, [=](auto* s, auto is_magnitude) {
    const auto place = [=](int64_t i) { return key_of<is_magnitude.value>(s[i]) - least; };
    const Histogram upper = histogram(n, [=](int64_t begin, int64_t end, uint32_t* bins) {
      for (int64_t i = begin; i < end; ++i) ++bins[place(i) >> shift];
    });
    int64_t rank = k, found = bin_of_rank(upper, rank) << shift;
    if (shift > 0) {
      const Histogram lower = histogram(n, [=](int64_t begin, int64_t end, uint32_t* bins) {
        for (int64_t i = begin; i < end; ++i) {
          if (place(i) >> shift == found >> shift) ++bins[place(i) - found];
        }
      });
      found += bin_of_rank(lower, rank);
    }
    return bits_of_key(found + least, format);
  });
}

}  // namespace

Keys keys_near(const void* threshold, Format format, bool magnitude) {
  const int64_t key = with_type(threshold, format, magnitude, [](auto* bits, auto is_magnitude) {
    return key_of<is_magnitude.value>(*bits);
  });
  const int64_t wide = format == Format::kFloat32 ? 1 << 18 : format == Format::kBFloat16 ? 1 << 2 : 1 << 5;
  return {key - wide, key + wide};
}

Window::Window(const void* scores, Format format, int64_t n, bool magnitude, Keys keys)
    : scores_(scores), format_(format), n_(n), magnitude_(magnitude) {
  const int64_t infinity = infinity_key(format), least = magnitude ? 0 : least_key(format, false) + 1;
  low_ = std::clamp(keys.low, least, infinity);
  const int64_t end = std::clamp(keys.high + 1, low_, infinity);
  const auto range = [=](int64_t from, int64_t to) {
    return KeepRange{static_cast<uint32_t>(from), static_cast<uint32_t>(to - from), magnitude};
  };
  ranges_ = {range(least, low_), range(low_, end), range(end, infinity)};
}

void Window::count(int64_t begin, int64_t end) {
  const RowKernels& rows = *chosen_capability().rows;
  const auto* scores = static_cast<const char*>(scores_);
  uint32_t here[kPart + 16];
  std::vector<uint32_t> found;
  WindowCount total{};
  for (int64_t first = begin; first < end; first += kPart) {
    const void* at = scores + first * bytes_of(format_);
    const WindowCount part = rows.window(here, at, format_, ranges_, std::min(kPart, end - first));
    total.below += part.below, total.inside += part.inside, total.above += part.above;
    if (total.inside <= most_inside(n_)) found.insert(found.end(), here, here + part.inside);
  }
  const std::lock_guard<std::mutex> lock(adding_);
  count_.below += total.below, count_.inside += total.inside, count_.above += total.above;
  if (count_.inside <= most_inside(n_)) found_.insert(found_.end(), found.begin(), found.end());
}

bool Window::find(int64_t k, uint32_t& bits) const {
  if (count_.below + count_.inside + count_.above < n_) {
    bits = nan_of(format_);
    return true;
  }
  if (k == 0) {
    bits = static_cast<uint32_t>(infinity_key(format_));
    return true;
  }
  const int64_t rank = k - count_.above;  // within the window, from 1
  if (rank < 1 || rank > count_.inside || count_.inside > most_inside(n_)) return false;
  // A coarse histogram first: nth_element alone takes 8 ns per key.
  int shift = 0;
  while (ranges_.inside.count >> shift >= kCoarse) ++shift;
  Histogram bins(kCoarse, 0);
  for (const uint32_t key : found_) ++bins[key >> shift];
  int64_t left = rank;
  const int64_t bin = bin_of_rank(bins, left);
  std::vector<uint32_t> keys;
  for (const uint32_t key : found_) {
    if (key >> shift == bin) keys.push_back(key);
  }
  std::nth_element(keys.begin(), keys.begin() + (left - 1), keys.end(), std::greater<>());
  bits = bits_of_key(low_ + keys[left - 1], format_);
  return true;
}

uint32_t kth_largest(const void* scores, Format format, int64_t n, int64_t k, bool magnitude) {
  Window window(scores, format, n, magnitude, sampled_keys(scores, format, n, k, magnitude));
  const int64_t parts = (n + kPart - 1) / kPart;
  parallel_for(0, parts, 16, [&](int64_t begin, int64_t end) { window.count(begin * kPart, std::min(end * kPart, n)); });
  uint32_t bits;
  return window.find(k, bits) ? bits : kth_largest_by_histograms(scores, format, n, k, magnitude);
}

}  // namespace mft
