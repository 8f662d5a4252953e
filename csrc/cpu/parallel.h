// Work on several threads: torch's, or with MFT_OWN_THREADS plain ones, whose start and end ThreadSanitizer sees (those of
// OpenMP are hidden from it, so that every hand-over between them would be a race to it).
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

// While it lives, its thread is one of several with work of their own each: whatever it calls stays on it.
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

// f(first, end of a span) for spans of at least `grain`, as at::parallel_for.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (!is_alone) return torch::stable::parallel_for(begin, end, grain, f);
  if (begin < end) f(begin, end);
}

#endif

}  // namespace mft
