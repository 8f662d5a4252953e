// Shares several products among the same threads: which of them all threads compute together, one after the other, and
// which parts each thread computes alone. A thread that computes a product alone waits for no other, and what it packs
// stays in its caches. But three equal products on two threads would leave a quarter of the threads' time idle.
//
//     together   | A: both threads | B: both threads |
//     apart                                          | C      | E  |
//                                                    | D    | F | G |
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace mft {

// A product, or other work.
struct Load {
  enum class Way { kAny, kTogether, kApart };  // kApart: by one thread, and not in parts

  double work;     // microseconds of all threads
  int64_t length;  // of the dimension that is cut, at multiples of `unit`
  int64_t unit;
  Way way = Way::kAny;
};

struct Part {
  int64_t load, first, end;
};

struct Plan {
  std::vector<int64_t> together;
  std::vector<Part> apart;  // the longest first
};

Plan plan(const std::vector<Load>& loads, int64_t threads);

// Calls together(load) and alone(part) until everything is done.
template <typename Together, typename Apart>
void share(const std::vector<Load>& loads, const Together& together, const Apart& alone) {
  const Plan found = plan(loads, num_threads());
  for (const int64_t load : found.together) together(load);
  const auto parts = static_cast<int64_t>(found.apart.size());
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(parts, num_threads()), 1, [&](int64_t, int64_t) {
    const Alone guard;
    for (int64_t i; (i = next++) < parts;) alone(found.apart[i]);
  });
}

}  // namespace mft
