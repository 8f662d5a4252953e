// Shares several products among the same threads (shared_work.h).
#include "shared_work.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>

namespace mft {
namespace {

constexpr double kImbalance = 0.05;   // share of the total time that threads may wait for each other at the end
constexpr double kForkAndJoin = 200;  // microseconds of work above which two forks and joins cost little

// Returns how long the longest thread works if each takes the next of works[first ..] as soon as it is free.
double longest(const std::vector<double>& works, size_t first, int64_t threads) {
  std::priority_queue<double, std::vector<double>, std::greater<>> busy;
  for (int64_t t = 0; t < threads; ++t) busy.push(0);
  double most = 0;
  for (size_t i = first; i < works.size(); ++i) {
    const double until = busy.top() + works[i];
    busy.pop();
    busy.push(until);
    most = std::max(most, until);
  }
  return most;
}

// Returns how many of works, the longest first, all threads must share so that they end the others at nearly the same
// time.
size_t head_of(const std::vector<double>& works, int64_t threads) {
  if (threads == 1) return 0;
  const double total = std::accumulate(works.begin(), works.end(), 0.0);
  double left = total;
  size_t head = 0;
  for (size_t step = 1; head < works.size(); step += head / 8) {
    if (longest(works, head, threads) - left / threads <= kImbalance * total / threads) break;
    const size_t end = std::min(works.size(), head + step);
    while (head < end) left -= works[head++];
  }
  return head;
}

}  // namespace

Plan plan(const std::vector<Load>& loads, int64_t threads) {
  Plan found;
  std::vector<int64_t> order;
  for (size_t i = 0; i < loads.size(); ++i) {
    (loads[i].way == Load::Way::kTogether ? found.together : order).push_back(static_cast<int64_t>(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return loads[a].work > loads[b].work; });
  std::vector<double> works;
  for (const int64_t i : order) works.push_back(loads[i].work);
  const size_t head = head_of(works, threads);
  for (size_t i = 0; i < order.size(); ++i) {
    const Load& load = loads[order[i]];
    const int64_t units = (load.length + load.unit - 1) / load.unit;
    if (i >= head || load.way == Load::Way::kApart || units < 2) {
      found.apart.push_back({order[i], 0, load.length});
    } else if (load.work >= kForkAndJoin) {
      found.together.push_back(order[i]);
    } else {
      const int64_t parts = std::min(threads, units);
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t end = p + 1 == parts ? load.length : units * (p + 1) / parts * load.unit;
        found.apart.push_back({order[i], units * p / parts * load.unit, end});
      }
    }
  }
  return found;
}

}  // namespace mft
