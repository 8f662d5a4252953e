// The exact k-th largest score without a sort (select.h). Keys are biased to be unsigned.
#include "select.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>

#include "parallel.h"

namespace mft {
namespace {

constexpr int64_t kBins = 1 << 16;
constexpr int64_t kChunk = 1 << 18;  // elements that a thread takes at a time
constexpr int64_t kStep = 1024;      // elements whose candidates are collected at once

// Bins on either side of a known threshold. In magnitude mode each is 2^-8 of its value wide. A step of the optimiser
// moves a threshold by far less than 3 %, and 0.6 % of N(0, sigma) scores lie this close to the 10 % cut.
constexpr uint32_t kNear = 8;

template <typename Bits, bool kMagnitude>
inline uint32_t biased_key(Bits bits) {
  constexpr Bits kTop = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  if (kMagnitude) return static_cast<Bits>(bits & static_cast<Bits>(~kTop));
  return static_cast<Bits>(bits & kTop ? ~bits : bits | kTop);
}

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

constexpr int lower_bit_count(bool wide, bool magnitude) { return !wide ? 0 : magnitude ? 15 : 16; }

// Returns the bin that holds the k-th largest. k becomes its rank within the bin.
int64_t bin_of_rank(const Histogram& bins, int64_t& k) {
  int64_t bin = kBins - 1;
  while (bin > 0 && bins[bin] < k) k -= bins[bin--];
  return bin;
}

bool any_non_finite(const Histogram& upper, Format format, bool magnitude) {
  // The key of infinity in 16 bits. fp32's upper 16 bits cut at infinity too: its key ends in zeros, that of -infinity
  // in ones.
  const int64_t infinity = format == Format::kFloat16 ? 0x7c00 : 0x7f80;
  const int64_t zero = magnitude ? 0 : 0x8000;
  const int64_t scale = magnitude && format == Format::kFloat32 ? 2 : 1;
  for (int64_t b = zero + infinity * scale; b < kBins; ++b) {
    if (upper[b] > 0) return true;
  }
  for (int64_t b = 0; b < zero - infinity; ++b) {
    if (upper[b] > 0) return true;
  }
  return false;
}

}  // namespace

Histogram histogram(int64_t n, const std::function<void(int64_t, int64_t, uint32_t*)>& count) {
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

Selection::Selection(const void* scores, Format format, int64_t n, bool magnitude, const void* near)
    : scores_(scores), format_(format), n_(n), magnitude_(magnitude) {
  if (near == nullptr || format != Format::kFloat32) return;
  const uint32_t key = with_type(near, format, magnitude, [](auto* s, auto is_magnitude) {
    return biased_key<std::decay_t<decltype(*s)>, is_magnitude.value>(*s);
  });
  const uint32_t bin = key >> lower_bit_count(true, magnitude);
  first_bin_ = bin > kNear ? bin - kNear : 0;
  near_bins_ = 2 * kNear + 1;
  most_candidates_ = n / 16 + kStep;
}

void Selection::count(uint32_t* bins, int64_t begin, int64_t end) {
  with_type(scores_, format_, magnitude_, [&](auto* s, auto is_magnitude) {
    using Bits = std::decay_t<decltype(*s)>;
    constexpr bool kMagnitude = is_magnitude.value;
    constexpr int kShift = lower_bit_count(sizeof(Bits) == 4, kMagnitude);
    if (near_bins_ == 0) {
      for (int64_t i = begin; i < end; ++i) ++bins[biased_key<Bits, kMagnitude>(s[i]) >> kShift];
      return;
    }
    std::vector<uint32_t> found;
    uint32_t here[kStep];
    for (int64_t first = begin; first < end; first += kStep) {
      const int64_t last = std::min(first + kStep, end);
      int64_t held = 0;
      for (int64_t i = first; i < last; ++i) {
        const uint32_t key = biased_key<Bits, kMagnitude>(s[i]);
        ++bins[key >> kShift];
        here[held] = key;
        held += is_near(key >> kShift);
      }
      found.insert(found.end(), here, here + held);
    }
    const std::lock_guard<std::mutex> lock(adding_);
    if (static_cast<int64_t>(candidates_.size()) <= most_candidates_) {
      candidates_.insert(candidates_.end(), found.begin(), found.end());
    }
  });
}

uint32_t Selection::lower_bits(uint32_t key, int64_t rank) const {
  const int shift = lower_bit_count(format_ == Format::kFloat32, magnitude_);
  const uint32_t lower = (1u << shift) - 1;
  const bool complete = static_cast<int64_t>(candidates_.size()) <= most_candidates_;
  if (is_near(key >> shift) && complete) {
    Histogram bins(kBins, 0);
    for (const uint32_t candidate : candidates_) {
      if (candidate - key <= lower) ++bins[candidate - key];
    }
    return static_cast<uint32_t>(bin_of_rank(bins, rank));
  }
  return with_type(scores_, format_, magnitude_, [&](auto* s, auto is_magnitude) {
    const Histogram bins = histogram(n_, [=](int64_t begin, int64_t end, uint32_t* counts) {
      for (int64_t i = begin; i < end; ++i) {
        const uint32_t other = biased_key<std::decay_t<decltype(*s)>, is_magnitude.value>(s[i]) - key;
        if (other <= lower) ++counts[other];
      }
    });
    return static_cast<uint32_t>(bin_of_rank(bins, rank));
  });
}

uint32_t Selection::kth_largest(const Histogram& upper, int64_t k) const {
  const bool wide = format_ == Format::kFloat32;
  if (any_non_finite(upper, format_, magnitude_)) {
    return wide ? 0x7fc00000 : format_ == Format::kBFloat16 ? 0x7fc0 : 0x7e00;
  }
  if (k == 0) return wide ? 0x7f800000 : format_ == Format::kBFloat16 ? 0x7f80 : 0x7c00;
  uint32_t key = static_cast<uint32_t>(bin_of_rank(upper, k)) << lower_bit_count(wide, magnitude_);
  if (wide) key += lower_bits(key, k);
  if (magnitude_) return key;
  const uint32_t top = 1u << (8 * bytes_of(format_) - 1), mask = wide ? ~0u : 0xffffu;
  return key & top ? key ^ top : ~key & mask;
}

uint32_t kth_largest(const void* scores, Format format, int64_t n, int64_t k, bool magnitude) {
  Selection selection(scores, format, n, magnitude, nullptr);
  const Histogram upper =
      histogram(n, [&](int64_t begin, int64_t end, uint32_t* bins) { selection.count(bins, begin, end); });
  return selection.kth_largest(upper, k);
}

}  // namespace mft
