// The exact k-th largest score without a sort: a histogram of the keys' upper bits, then one of the lower.
//
//     fp32   key = [ upper 16 bits | lower bits ]      16-bit scores: the key is the upper 16 bits
//                        |              |
//            bins of one pass     bins of a second pass over all scores, or over the candidates: the keys that the
//                                 first pass found in the bins around a known threshold
#pragma once

#include <functional>
#include <mutex>
#include <vector>

#include "row_kernels.h"

namespace mft {

// The value of the k-th largest |score| (score, if not magnitude) among n, 1 <= k <= n, as the bits of the format.
// NaN if any score is NaN or infinite. k == 0 gives +infinity.
uint32_t kth_largest(const void* scores, Format format, int64_t n, int64_t k, bool magnitude);

using Histogram = std::vector<int64_t>;  // 2^16 bins

// Calls count(begin, end, bins) for all chunks of [0, n), on all threads. It adds to 32-bit bins, and their sum is
// returned. All chunks but the last are multiples of 1024 long.
Histogram histogram(int64_t n, const std::function<void(int64_t begin, int64_t end, uint32_t* bins)>& count);

// The k-th largest score, counted chunk by chunk in the caller's own pass over the scores:
// kth_largest(histogram(n, [&](begin, end, bins) { ... count(bins, begin, end) ... })).
class Selection {
 public:
  // near: the bits of a threshold that the k-th largest is expected to be close to, or nullptr.
  Selection(const void* scores, Format format, int64_t n, bool magnitude, const void* near);

  // Counts scores [begin, end) at their current values. Any thread may call it.
  void count(uint32_t* bins, int64_t begin, int64_t end);

  uint32_t kth_largest(const Histogram& upper, int64_t k) const;  // after all are counted; bits as above

 private:
  bool is_near(uint32_t bin) const { return bin - first_bin_ < near_bins_; }
  uint32_t lower_bits(uint32_t key, int64_t rank) const;

  const void* scores_;
  Format format_;
  int64_t n_;
  bool magnitude_;
  uint32_t first_bin_ = 0, near_bins_ = 0;
  std::mutex adding_;
  int64_t most_candidates_ = 0;  // above it, a second pass is less work, and candidates_ is incomplete
  std::vector<uint32_t> candidates_;
};

}  // namespace mft
