// A model of the cycles of a launch, from its sizes alone. It is the same as in mft_kernels/backends/triton/cost.py,
// which explains it; a test compares the two.
#pragma once

#include <algorithm>
#include <cstdint>

#include "api.h"

namespace mft::cuda {

constexpr double kLatency = 900;  // cycles from a request to memory until its bytes are there
constexpr double kWgmma = 2048;   // multiply-adds per cycle and multiprocessor: H100 with 132, 989 TFLOP/s, 1.83 GHz
constexpr int kMostParts = 16;    // of a sum
constexpr double kNever = 1e300;  // cycles

// Rates per cycle and multiprocessor, of the card in mft_kernels/backends/triton/cards.py that stands for a compute
// capability.
struct Rates {
  double multiply_adds;  // of mma.sync, 16-bit; on 9.0 and 10.x an estimate, half of wgmma's and a quarter of tcgen05's
  double memory;         // bytes
  double launch;         // cycles of one more launch: 2 us
  double l2 = 36;        // bytes from L2; cards.py says where it is from
};

inline Rates rates_of(int capability) {
  if (capability >= 120) return {256, 4.4, 4800};
  if (capability >= 100) return {1024, 29, 3700};
  if (capability >= 90) return {1024, 14, 3700};
  return capability == 80 ? Rates{1024, 13.4, 2800} : Rates{256, 3.1, 5000};
}

struct Jobs {
  int64_t count, steps;
  double multiply_adds, read;  // of a step
  double written;              // of a job
};

constexpr int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Return the cycles of the multiprocessor that has most to do. `rate`: multiply-adds per cycle and multiprocessor.
// `l2`: see Rates. `blocks` share a multiprocessor, and each holds the bytes of `stages` steps.
inline double busy_cycles(const Jobs& jobs, int multiprocessors, int blocks, int stages, double rate, double l2) {
  const int64_t places = static_cast<int64_t>(multiprocessors) * blocks;
  const int64_t at_work = std::min<int64_t>(blocks, quotient(jobs.count, multiprocessors));
  const double bytes = std::min(l2, at_work * (stages - 1) * jobs.read / kLatency);
  const double cycles =
      jobs.steps * std::max(jobs.multiply_adds / rate, jobs.read / bytes) + jobs.written / l2;
  const int64_t most = jobs.count / places * blocks + quotient(jobs.count % places, multiprocessors);
  return most * cycles + quotient(most, blocks) * 2 * kLatency;
}

// Return the cycles of a launch whose operands have this many bytes, counted once each.
inline double launch_cycles(double busy, double bytes, const Device& device) {
  const double waiting = bytes / (rates_of(device.capability).memory * device.multiprocessors);
  return std::max(waiting, busy) + 0.5 * std::min(waiting, busy);
}

// Return the cycles of the launch that adds the parts.
inline double sum_cycles(int parts, double elements, const Device& device) {
  if (parts == 1) return 0;
  const Rates rates = rates_of(device.capability);
  return rates.launch + 2 * parts * 4 * elements / (rates.l2 * device.multiprocessors);
}

// Return the largest number of parts to try: as many as the depth has room for, as run in two waves, and as have sums
// that fit in half of L2. part_bytes: of the sums of a part.
inline int64_t most_parts(int64_t of_depth, int64_t places, int64_t tiles, int64_t part_bytes, const Device& device) {
  return std::min<int64_t>({kMostParts, of_depth, places / tiles, device.l2_bytes / 2 / part_bytes});
}

// Make `best` the fastest plan with `first` to `most` parts of `steps`, if it is faster. cycles(parts): of a plan.
template <class Cycles>
void try_parts(Plan& best, int tokens, int64_t steps, int64_t first, int64_t most, int64_t part_bytes,
               const Cycles& cycles) {
  for (int parts = static_cast<int>(first); parts <= std::max<int64_t>(1, most); ++parts) {
    if (parts > 1 && quotient(steps, quotient(steps, parts)) != parts) continue;  // a part would be empty
    const double taken = cycles(parts);
    if (taken < best.cycles) best = {taken, tokens, parts, parts > 1 ? parts * part_bytes : 0};
  }
}

// Return the bytes that a product reads and writes, counted once each.
inline double bytes_of(const Product& p) {
  const double elements = static_cast<double>(p.weight.rows) * p.weight.columns;
  const double keep = p.keep.words != nullptr ? 1.0 / 8 : bytes_of(p.keep.scores.type);
  return 2.0 * p.out.rows * (p.out.columns + p.in.columns) + elements * (2 + keep);
}

// Per element of d_scores: weight, sign and result in 16 bits, or weight and fp32.
constexpr int kEpilogueBytes = 6;

inline double bytes_of(const ScoreGrad& p) {
  const double n = p.weight.rows, k = p.weight.columns;
  return 2 * p.x.rows * (n + k) + kEpilogueBytes * n * k;
}

}  // namespace mft::cuda
