// The exact k-th largest score without a sort: a histogram of the keys' upper bits, then one of the lower.
//
// 16-bit scores need one pass over 2^16 bins. fp32 scores need two: the upper 16 bits of all keys, then the lower 16
// of those whose upper bits are the k-th one's (a small part). Keys are biased to be unsigned.
#include "select.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

namespace mft {
namespace {

constexpr int64_t kBins = 1 << 16;
constexpr int64_t kChunk = 1 << 18;  // elements that a thread takes at a time

using Histogram = std::vector<int64_t>;

template <typename Bits, bool kMagnitude>
inline uint32_t biased_key(Bits bits) {
  constexpr Bits kTop = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  if (kMagnitude) return static_cast<Bits>(bits & static_cast<Bits>(~kTop));
  return static_cast<Bits>(bits & kTop ? ~bits : bits | kTop);
}

// Adds the histogram of count(chunk) over all chunks; count(begin, end, bins) fills 32-bit bins.
template <typename Count>
Histogram histogram(int64_t n, const Count& count) {
  Histogram total(kBins, 0);
  std::mutex merging;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
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

// The bin that holds the k-th largest; k becomes its rank within the bin.
int64_t bin_of_rank(const Histogram& bins, int64_t& k) {
  int64_t bin = kBins - 1;
  while (bin > 0 && bins[bin] < k) k -= bins[bin--];
  return bin;
}

bool any_non_finite(const Histogram& upper, Format format, bool magnitude) {
  // In 16 bits; fp32's upper 16 bits cut at infinity too: its key ends in zeros, minus infinity's in ones.
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

template <typename Bits, bool kMagnitude>
uint32_t kth_largest_typed(const Bits* scores, Format format, int64_t n, int64_t k) {
  constexpr bool kWide = sizeof(Bits) == 4;
  constexpr int kShift = !kWide ? 0 : kMagnitude ? 15 : 16;
  constexpr uint32_t kLower = (1u << kShift) - 1;
  const Histogram upper = histogram(n, [=](int64_t begin, int64_t end, uint32_t* bins) {
    for (int64_t i = begin; i < end; ++i) ++bins[biased_key<Bits, kMagnitude>(scores[i]) >> kShift];
  });
  if (any_non_finite(upper, format, kMagnitude)) return kWide ? 0x7fc00000 : format == Format::kBFloat16 ? 0x7fc0 : 0x7e00;
  if (k == 0) return kWide ? 0x7f800000 : format == Format::kBFloat16 ? 0x7f80 : 0x7c00;
  uint32_t key = static_cast<uint32_t>(bin_of_rank(upper, k)) << kShift;
  if (kWide) {
    const Histogram lower = histogram(n, [=](int64_t begin, int64_t end, uint32_t* bins) {
      for (int64_t i = begin; i < end; ++i) {
        const uint32_t other = biased_key<Bits, kMagnitude>(scores[i]) - key;
        if (other <= kLower) ++bins[other];
      }
    });
    key += static_cast<uint32_t>(bin_of_rank(lower, k));
  }
  if (kMagnitude) return key;
  constexpr uint32_t kTop = 1u << (8 * sizeof(Bits) - 1);
  return key & kTop ? key ^ kTop : static_cast<Bits>(~key);
}

}  // namespace

uint32_t kth_largest(const void* scores, Format format, int64_t n, int64_t k, bool magnitude) {
  if (format == Format::kFloat32) {
    auto* s = static_cast<const uint32_t*>(scores);
    return magnitude ? kth_largest_typed<uint32_t, true>(s, format, n, k)
                     : kth_largest_typed<uint32_t, false>(s, format, n, k);
  }
  auto* s = static_cast<const uint16_t*>(scores);
  return magnitude ? kth_largest_typed<uint16_t, true>(s, format, n, k)
                   : kth_largest_typed<uint16_t, false>(s, format, n, k);
}

}  // namespace mft
