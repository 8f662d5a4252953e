// Work on several threads: torch's, or plain threads with MFT_OWN_THREADS. ThreadSanitizer sees when plain threads
// start and end. It does not see this for OpenMP's threads, so it would report every hand-over between them as a race.
#pragma once

#include <algorithm>
#include <cstdint>
#ifdef MFT_OWN_THREADS
#include <thread>
#include <vector>
#else
#include <torch/csrc/stable/ops.h>
#endif

namespace mft {

inline thread_local bool is_alone = false;

// While an Alone exists, its thread is one of several that each have their own work. Everything that it calls stays on
// it.
class Alone {
 public:
  Alone() : before_(is_alone) { is_alone = true; }
  ~Alone() { is_alone = before_; }
  Alone(const Alone&) = delete;
  Alone& operator=(const Alone&) = delete;

 private:
  const bool before_;
};

#ifdef MFT_OWN_THREADS

inline int64_t num_threads() { return is_alone ? 1 : 4; }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  if (is_alone) return f(begin, end);
  const int64_t threads = std::min(num_threads(), (count + grain - 1) / std::max<int64_t>(grain, 1));
  std::vector<std::thread> running;
  for (int64_t i = 0; i < threads; ++i) {
    running.emplace_back([&f, begin, count, threads, i] {
      const int64_t first = begin + count * i / threads, last = begin + count * (i + 1) / threads;
      if (first < last) f(first, last);
    });
  }
  for (std::thread& thread : running) thread.join();
}

#else

inline int64_t num_threads() { return is_alone ? 1 : torch::stable::get_num_threads(); }

// Calls f(first, end) for spans of at least `grain`, like at::parallel_for.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (!is_alone) return torch::stable::parallel_for(begin, end, grain, f);
  if (begin < end) f(begin, end);
}

#endif

}  // namespace mft
