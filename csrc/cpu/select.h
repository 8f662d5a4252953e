// The exact k-th largest score without a sort. It almost always lies in a window of keys that a sample of the scores, or
// a threshold from before, suggests:
//
//     keys   below | inside | above        one pass counts the outer two and collects the keys inside
//
// If it does not, or if too many keys are inside, two passes make histograms of the keys' upper and lower bits.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "row_kernels.h"

namespace mft {

// The value of the k-th largest |score| (score, if not magnitude) among n, 0 <= k <= n, as the bits of the format.
// NaN if any score is NaN or infinite. k == 0 gives +infinity.
uint32_t kth_largest(const void* scores, Format format, int64_t n, int64_t k, bool magnitude);

// Keys from low to high (see KeepRange). They may lie beyond those of finite scores.
struct Keys {
  int64_t low, high;
};

// Returns the keys around a threshold, 3 % of it to either side. An optimiser step moves a threshold by far less, and
// 0.6 % of N(0, sigma) scores lie this close to the 10 % cut.
Keys keys_near(const void* threshold, Format format, bool magnitude);

// A window of keys, counted span by span, also in a pass that the caller makes over the scores anyway.
class Window {
 public:
  Window(const void* scores, Format format, int64_t n, bool magnitude, Keys keys);

  // Counts scores [begin, end) at their current values. Any thread may call it.
  void count(int64_t begin, int64_t end);

  // Once all are counted: sets bits to what kth_largest() returns, or returns false if the window cannot tell.
  bool find(int64_t k, uint32_t& bits) const;

 private:
  const void* scores_;
  Format format_;
  int64_t n_;
  bool magnitude_;
  int64_t low_;
  Ranges ranges_;
  std::mutex adding_;
  WindowCount count_{};
  std::vector<uint32_t> found_;  // keys inside, less low_; incomplete if there are too many
};

}  // namespace mft
