// Shared parts of fused_linear.cpp and fused_grad_scores.cpp: buffers, cuts into blocks, threads and prefetching.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "fused_linear.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "slab.h"

namespace mft {

inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t elements) : scratch_(elements * sizeof(T) + 64) {}
  T* get() const { return static_cast<T*>(scratch_.get()); }

 private:
  Scratch scratch_;
};

inline char* at(const Matrix& m, int64_t row, int64_t column = 0) { return m.row(row) + column * bytes_of(m.format); }

// Returns the length of nearly equal pieces of `total`: a multiple of `unit`, at most `largest`, which is also a
// multiple of `unit`. A short last piece would cost nearly as much as a long one.
inline int64_t nearly_equal(int64_t total, int64_t largest, int64_t unit) {
  return round_up(divide_up(total, std::max<int64_t>(1, divide_up(total, largest))), unit);
}

// A dimension cut into blocks of nearly equal size, with the same number of blocks for each thread.
struct Cut {
  int64_t total, blocks, unit;
  Cut(int64_t total, int64_t largest, int64_t unit)
      : total(total), blocks(std::max<int64_t>(1, divide_up(total, largest))), unit(unit) {
    const int64_t units = divide_up(total, unit), threads = num_threads();
    blocks = std::max<int64_t>(1, std::min(round_up(blocks, threads), units));
  }
  int64_t begin(int64_t block) const { return std::min(total, divide_up(total, unit) * block / blocks * unit); }
  int64_t end(int64_t block) const { return begin(block + 1); }
  int64_t largest() const { return round_up(divide_up(total, blocks), unit) + unit; }
};

// Calls f(worker, next) on all threads. next() returns each task 0 .. tasks - 1 once, then `tasks`. A worker's first
// task is reserved for it: otherwise a worker that asks for two tasks at once could leave none to a thread that starts
// late.
template <typename F>
void for_workers(int64_t tasks, const F& f) {
  const int64_t threads = std::min<int64_t>(num_threads(), tasks);
  std::atomic<int64_t> task{threads};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      bool began = false;
      f(worker, [&] { return std::exchange(began, true) ? std::min(task++, tasks) : worker; });
    }
  });
}

// Calls f(begin, end) with the rows of each tile: whole tiles if gemm.whole_tiles, else nearly equal numbers of rows.
template <typename F>
void for_tile_rows(const Gemm& gemm, int64_t tile_rows, int64_t rows, const F& f) {
  const int64_t tiles = divide_up(rows, tile_rows);
  const auto begin = [&](int64_t t) { return gemm.whole_tiles ? std::min(rows, t * tile_rows) : rows * t / tiles; };
  for (int64_t t = 0; t < tiles; ++t) f(begin(t), begin(t + 1));
}

// The addresses that multiply() prefetches into L2 while it works on something else. Soon: what the next tiles read.
// Late: the weight and scores of the next block, towards the end of this block, so that the tiles in between do not
// evict them.
class Ahead {
 public:
  explicit Ahead(const Gemm& gemm) : gemm_(gemm) {}

  // Call before the first of `calls` multiplications of `groups` groups each.
  void start_block(int64_t calls, int64_t groups) {
    soon_.clear();
    late_.clear();
    next_soon_ = next_late_ = 0;
    calls_left_ = calls;
    per_call_ = gemm_.prefetch_groups == 0 ? 0 : groups / gemm_.prefetch_groups;
  }

  void add_soon(const void* from, int64_t bytes) { add(soon_, from, bytes); }

  // Adds rows of the weight, and of the scores if the mask comes from them.
  void add_late(const Weight& weight, const MaskSource& mask, int64_t row, int64_t end_row, int64_t column,
                int64_t columns) {
    for (int64_t r = row; r < end_row; ++r) {
      const Span span = weight.span(r, column, columns);
      add(late_, span.from, span.bytes);
      if (mask.scores != nullptr) add(late_, mask.row(r, column).scores, columns * bytes_of(mask.score_format));
    }
  }

  // Returns the list for the next multiplication, or nullptr.
  const char* const* take() {
    const int64_t calls_left = calls_left_--;
    if (const auto* found = take(soon_, next_soon_)) return found;
    const int64_t late = static_cast<int64_t>(late_.size() - next_late_);
    // If all threads prefetch one line per group, memory is at its limit. Prefetch at half that rate while there is
    // time.
    return 2 * late >= calls_left * per_call_ ? take(late_, next_late_) : nullptr;
  }

 private:
  void add(std::vector<const char*>& list, const void* from, int64_t bytes) const {
    if (per_call_ == 0) return;
    for (int64_t done = 0; done < bytes; done += kPrefetchBytes) {
      list.push_back(static_cast<const char*>(from) + done);
    }
  }

  const char* const* take(const std::vector<const char*>& list, size_t& next) const {
    if (per_call_ == 0 || next + per_call_ > list.size()) return nullptr;
    next += per_call_;
    return list.data() + next - per_call_;
  }

  const Gemm& gemm_;
  std::vector<const char*> soon_, late_;
  size_t next_soon_ = 0, next_late_ = 0;
  int64_t calls_left_ = 0, per_call_ = 0;
};

// The depth of a product in groups, cut into blocks of kDepth groups. Packed operands pad each block with zeros.
struct Depth {
  int64_t elements, per_group;
  int64_t block_elements() const { return kDepth * per_group; }
  int64_t blocks() const { return divide_up(elements, block_elements()); }
  int64_t first(int64_t block) const { return block * block_elements(); }
  int64_t length(int64_t block) const { return std::min(block_elements(), elements - first(block)); }
  int64_t groups(int64_t block) const { return divide_up(length(block), per_group); }
  int64_t packed_groups(int64_t block) const { return round_up(groups(block), kDepthStep); }
};

// Writes zeros from group `groups` up to a multiple of kDepthStep, in panels that lie panel_stride apart.
inline void fill_depth(uint32_t* b, int64_t panel_stride, int64_t groups, int64_t columns) {
  const int64_t missing = round_up(groups, kDepthStep) - groups;
  for (int64_t c = 0; missing > 0 && c < columns; c += kTileColumns, b += panel_stride) {
    std::memset(b + groups * kTileColumns, 0, missing * kTileColumns * sizeof *b);
  }
}

// Calls gemm.begin() and gemm.end() around a thread's multiplications.
class Session {
 public:
  explicit Session(const Gemm& gemm) : gemm_(gemm) {
    if (gemm.begin != nullptr) gemm.begin();
  }
  ~Session() {
    if (gemm_.end != nullptr) gemm_.end();
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  const Gemm& gemm_;
};

}  // namespace mft
