// How many cycles a launch keeps the multiprocessor busy that has most to do: as mft_kernels/triton/cost.py, which says
// why; a test compares the two.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mft::cuda {

constexpr double kL2Bytes = 40;  // a cycle, from L2 to a multiprocessor
constexpr double kLatency = 900;  // cycles from a request to memory until its bytes are there

struct Jobs {
  int64_t count, steps;
  double multiply_adds, read;  // of a step
  double written;              // of a job
};

// `rate`: multiply-adds a cycle and multiprocessor. `blocks` share one, and each holds the bytes of `stages` steps.
inline double busy_cycles(const Jobs& jobs, int multiprocessors, int blocks, int stages, double rate) {
  const auto quotient = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t places = static_cast<int64_t>(multiprocessors) * blocks;
  const int64_t at_work = std::min<int64_t>(blocks, quotient(jobs.count, multiprocessors));
  const double bytes = std::min(kL2Bytes, at_work * (stages - 1) * jobs.read / kLatency);
  const double cycles =
      jobs.steps * std::max(jobs.multiply_adds / rate, jobs.read / bytes) + jobs.written / kL2Bytes;
  const int64_t most = jobs.count / places * blocks + quotient(jobs.count % places, multiprocessors);
  return most * cycles + quotient(most, blocks) * 2 * kLatency;
}

}  // namespace mft::cuda
