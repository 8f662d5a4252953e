// The masked linear layer and its score gradient in bf16, the mask fused into the packing of a GEMM (gemm_bfloat16.h).
//
// The activations are packed once a call. Then each thread takes blocks of the weight: it masks a block of the weight
// into its own cache while it packs it, multiplies, and meanwhile brings in the next block. Sums run in fp32 over the
// whole inner dimension, in an order that depends on neither the threads nor the cut into blocks.
#include "fused_linear.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "gemm_bfloat16.h"
#include "parallel.h"
#include "scratch.h"

namespace mft {
namespace bfloat16 {
namespace {

// From sweeps on Zen 5 (1 MiB L2 a core, 2 threads, N = K = 4096, M = 64, 512 and 2048, 2026-11-24); flat around them. On
// Zen 4 twice the rows are level at M = 512 and 3 % slower at M = 64.
constexpr int64_t kWeightRows = 96;        // rows of the weight in a block: 8 tiles, 104 KB a depth of 512 packed
constexpr int64_t kWeightColumns = 256;    // columns of it in a block of d_x: with kGradDepth rows 128 KB packed
constexpr int64_t kGradDepth = 256;        // divides kDepth
constexpr int64_t kTaskColumns = 1024;     // columns in a task of d_x: half a page of a bf16 row, as page walks cost
constexpr int64_t kTokens = 2048;          // the fp32 sums of a block are kept for so many tokens
constexpr int64_t kSumBytes = 4 << 20;     // and take no more than this a thread
constexpr int64_t kCacheBytes = 16 << 20;  // an output beyond this is written around the cache

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t elements) : scratch_(elements * sizeof(T) + 64) {}
  T* get() const { return static_cast<T*>(scratch_.get()); }

 private:
  Scratch scratch_;
};

const uint16_t* elements(const Matrix& m, int64_t row, int64_t column = 0) {
  return reinterpret_cast<const uint16_t*>(m.row(row)) + column;
}

uint16_t* mutable_elements(const Matrix& m, int64_t row, int64_t column = 0) {
  return reinterpret_cast<uint16_t*>(m.row(row)) + column;
}

// A dimension cut into blocks of nearly equal size, as many for each thread.
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

// f(worker, next) on all threads; next() hands out 0 .. tasks - 1, then `tasks`. A worker's first task is its own: one that
// asks for two at once would else leave nothing to a thread that wakes up late.
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

// f(begin, end) of nearly equal groups of at most 12 rows.
template <typename F>
void for_tile_rows(int64_t rows, const F& f) {
  const int64_t tiles = divide_up(rows, kTileRows);
  for (int64_t t = 0; t < tiles; ++t) f(rows * t / tiles, rows * (t + 1) / tiles);
}

// The addresses that multiply() brings into L2 while it works on something else: what the next tiles read at once, and
// the weight and scores of the next block towards the end of this one, lest the tiles between push them out again.
class Ahead {
 public:
  // Before the first of `calls` multiplications of `pairs` pairs.
  void start_block(int64_t calls, int64_t pairs) {
    soon_.clear();
    late_.clear();
    next_soon_ = next_late_ = 0;
    calls_left_ = calls;
    per_call_ = pairs / kPrefetchPairs;
  }

  void add_soon(const void* from, int64_t bytes) { add(soon_, from, bytes); }

  // Rows of the weight, and of the scores where the mask comes from them.
  void add_late(const Matrix& weight, const MaskSource& mask, int64_t row, int64_t end_row, int64_t column,
                int64_t columns) {
    for (int64_t r = row; r < end_row; ++r) {
      add(late_, elements(weight, r, column), columns * 2);
      if (mask.scores != nullptr) add(late_, mask.row(r, column).scores, columns * bytes_of(mask.score_format));
    }
  }

  // What the next multiplication takes along, or nullptr.
  const char* const* take() {
    const int64_t calls_left = calls_left_--;
    if (const auto* found = take(soon_, next_soon_)) return found;
    const int64_t late = static_cast<int64_t>(late_.size() - next_late_);
    // With all threads at a line a pair, memory is at its limit: ask at half that rate where there is time.
    return 2 * late >= calls_left * per_call_ ? take(late_, next_late_) : nullptr;
  }

 private:
  static void add(std::vector<const char*>& list, const void* from, int64_t bytes) {
    for (int64_t done = 0; done < bytes; done += kPrefetchBytes) {
      list.push_back(static_cast<const char*>(from) + done);
    }
  }

  const char* const* take(const std::vector<const char*>& list, size_t& next) const {
    if (per_call_ == 0 || next + per_call_ > list.size()) return nullptr;
    next += per_call_;
    return list.data() + next - per_call_;
  }

  std::vector<const char*> soon_, late_;
  size_t next_soon_ = 0, next_late_ = 0;
  int64_t calls_left_ = 0, per_call_ = 0;
};

// y.T tile = masked weight @ x.T: the weight's rows are rows of A as they lie in memory, and x.T is packed once.
void masked_linear(const Matrix& y, const Matrix& x, const Matrix& weight, const MaskSource& mask, const void* bias) {
  const int64_t tokens = x.rows, depth = x.columns;
  const int64_t depth_blocks = divide_up(depth, kDepth), token_tiles = divide_up(tokens, kTileColumns);
  const Buffer<uint32_t> panels(divide_up(depth, 2) * token_tiles * kTileColumns);
  const auto depth_of = [&](int64_t block) { return std::min(kDepth, depth - block * kDepth); };
  const auto panel_size = [&](int64_t block) { return divide_up(depth_of(block), 2) * kTileColumns; };
  const auto panel_at = [&](int64_t block, int64_t tile) {
    return panels.get() + block * token_tiles * (kDepth / 2 * kTileColumns) + tile * panel_size(block);
  };
  parallel_for(0, depth_blocks * token_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / token_tiles, tile = i % token_tiles, first = tile * kTileColumns;
      pack_transposed_panel(panel_at(block, tile), elements(x, first, block * kDepth), x.row_stride,
                            std::min(kTileColumns, tokens - first), depth_of(block));
    }
  });

  const Cut rows(weight.rows, kWeightRows, 1);
  const int64_t chunk = std::min(round_up(tokens, kTileColumns), kTokens), sum_stride = chunk + 16;
  const int64_t sums_size = rows.largest() * sum_stride, block_size = rows.largest() * kRowStride;
  const int64_t workers = num_threads();
  const Buffer<float> all_sums(workers * sums_size);
  const Buffer<uint16_t> all_blocks(workers * block_size);
  for_workers(rows.blocks, [&](int64_t worker, const auto& next) {
    float* sums = all_sums.get() + worker * sums_size;
    uint16_t* a = all_blocks.get() + worker * block_size;
    Ahead ahead;
    for (int64_t task = next(), upcoming; task < rows.blocks; task = upcoming) {
      upcoming = next();
      const int64_t first = rows.begin(task), count = rows.end(task) - first;
      for (int64_t token = 0; token < tokens; token += chunk) {
        const int64_t here = std::min(chunk, tokens - token);
        for (int64_t block = 0; block < depth_blocks; ++block) {
          for (int64_t r = 0; r < count; ++r) {
            pack_masked_row(a + r * kRowStride, elements(weight, first + r, block * kDepth),
                            mask.row(first + r, block * kDepth), mask.score_format, depth_of(block));
          }
          const int64_t pairs = divide_up(depth_of(block), 2);
          ahead.start_block(divide_up(here, kTileColumns) * divide_up(count, kTileRows), pairs);
          if (block + 1 < depth_blocks) {
            ahead.add_late(weight, mask, first, first + count, (block + 1) * kDepth, depth_of(block + 1));
          } else if (token + chunk >= tokens && upcoming < rows.blocks) {
            ahead.add_late(weight, mask, rows.begin(upcoming), rows.end(upcoming), 0, depth_of(0));
          }
          for (int64_t t = 0; t < here; t += kTileColumns) {
            const uint32_t* b = panel_at(block, (token + t) / kTileColumns);
            ahead.add_soon(b + panel_size(block), panel_size(block) * 4);
            for_tile_rows(count, [&](int64_t begin, int64_t end) {
              prefetch_tile(sums + end * sum_stride + t, sum_stride, kTileRows);
              multiply(sums + begin * sum_stride + t, sum_stride, a + begin * kRowStride, b, end - begin, here - t,
                       pairs, block > 0, ahead.take());
            });
          }
        }
        store_transposed(mutable_elements(y, token, first), y.row_stride, sums, sum_stride, count, here,
                         bias != nullptr ? static_cast<const uint16_t*>(bias) + first : nullptr);
      }
    }
  });
}

// d_x tile = grad_output @ masked weight: grad_output is packed once, pairs of the weight's rows become panels.
void grad_x(const Matrix& d_x, const Matrix& grad_output, const Matrix& weight, const MaskSource& mask) {
  const int64_t tokens = grad_output.rows, depth = weight.rows;
  const int64_t depth_blocks = divide_up(depth, kDepth), block_size = tokens * kRowStride;
  const Buffer<uint16_t> blocks(depth_blocks * block_size);
  parallel_for(0, depth_blocks * tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tokens, token = i % tokens;
      pack_row(blocks.get() + i * kRowStride, elements(grad_output, token, block * kDepth),
               std::min(kDepth, depth - block * kDepth));
    }
  });

  // A task takes whole pages of the weight's rows as long as its sums fit the cache; it masks them in pieces.
  const int64_t chunk = std::max<int64_t>(1, std::min(tokens, kTokens));
  const int64_t fitting = kSumBytes / 4 / chunk / kWeightColumns * kWeightColumns;
  const Cut columns(weight.columns, std::min(kTaskColumns, std::max(fitting, kWeightColumns)), kTileColumns);
  const int64_t sum_stride = columns.largest() + 16, panel = kGradDepth / 2 * kTileColumns + kTileColumns;
  const int64_t sums_size = chunk * sum_stride, panels_size = kWeightColumns / kTileColumns * panel;
  const int64_t workers = num_threads();
  const Buffer<float> all_sums(workers * sums_size);
  const Buffer<uint32_t> all_panels(workers * panels_size);
  for_workers(columns.blocks, [&](int64_t worker, const auto& next) {
    float* sums = all_sums.get() + worker * sums_size;
    uint32_t* panels = all_panels.get() + worker * panels_size;
    Ahead ahead;
    for (int64_t task; (task = next()) < columns.blocks;) {
      const int64_t first = columns.begin(task), end_column = columns.end(task);
      for (int64_t token = 0; token < tokens; token += chunk) {
        const int64_t here = std::min(chunk, tokens - token);
        for (int64_t row = 0; row < depth; row += kGradDepth) {
          const int64_t end_row = std::min(depth, row + kGradDepth), pairs = divide_up(end_row - row, 2);
          const uint16_t* a = blocks.get() + row / kDepth * block_size + token * kRowStride + row % kDepth;
          for (int64_t column = first; column < end_column; column += kWeightColumns) {
            const int64_t count = std::min(kWeightColumns, end_column - column);
            for (int64_t r = row; r < end_row; r += 2) {
              const bool odd = r + 1 < end_row;
              pack_masked_row_pair(panels + (r - row) / 2 * kTileColumns, panel, elements(weight, r, column),
                                   odd ? elements(weight, r + 1, column) : nullptr, mask.row(r, column),
                                   mask.row(r + odd, column), mask.score_format, count);
            }
            ahead.start_block(divide_up(here, kTileRows) * divide_up(count, kTileColumns), pairs);
            if (column + count < end_column) {
              ahead.add_late(weight, mask, row, end_row, column + count,
                             std::min(kWeightColumns, end_column - column - count));
            } else {
              ahead.add_late(weight, mask, end_row, std::min(depth, end_row + kGradDepth), first,
                             std::min(kWeightColumns, end_column - first));
            }
            for_tile_rows(here, [&](int64_t begin, int64_t end) {
              for (int64_t r = end; r < std::min(here, end + kTileRows); ++r) {
                ahead.add_soon(a + r * kRowStride, 4 * pairs);
              }
              for (int64_t c = 0; c < count; c += kTileColumns) {
                float* tile = sums + begin * sum_stride + column - first + c;
                prefetch_tile(tile + kTileColumns, sum_stride, end - begin);
                multiply(tile, sum_stride, a + begin * kRowStride, panels + c / kTileColumns * panel, end - begin,
                         count - c, pairs, row > 0, ahead.take());
              }
            });
          }
        }
        for (int64_t t = 0; t < here; ++t) {
          store_row(mutable_elements(d_x, token + t, first), sums + t * sum_stride, end_column - first);
        }
      }
    }
  });
}

// A tile of grad_output.T @ x never leaves the cache: weight and sign are multiplied in when its sum is complete.
void grad_scores(const Matrix& out, const Matrix& grad_output, const Matrix& x, const Matrix& weight,
                 const SignSource& sign, bool accumulate) {
  const int64_t tokens = x.rows, columns = x.columns;
  const int64_t depth_blocks = divide_up(tokens, kDepth), column_tiles = divide_up(columns, kTileColumns);
  const int64_t panel = divide_up(std::min(tokens, kDepth), 2) * kTileColumns;
  const Buffer<uint32_t> panels(depth_blocks * column_tiles * panel);
  const auto depth_of = [&](int64_t block) { return std::min(kDepth, tokens - block * kDepth); };
  parallel_for(0, divide_up(tokens, 2), 8, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t block = 2 * p / kDepth;
      uint32_t* b = panels.get() + block * column_tiles * panel + (p - block * kDepth / 2) * kTileColumns;
      pack_row_pair(b, panel, elements(x, 2 * p), 2 * p + 1 < tokens ? elements(x, 2 * p + 1) : nullptr, columns);
    }
  });

  const int64_t out_bytes = out.columns * bytes_of(out.format);
  const bool stream = !accumulate && out.rows * out_bytes > kCacheBytes && out_bytes % 64 == 0 &&
                      reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
  const ScoreGrad grad{out.data,          out.format, elements(weight, 0), sign.scores, sign.score_format,
                       sign.words, columns,    accumulate,          stream};
  const Cut rows(weight.rows, kWeightRows, 1);
  const int64_t block_size = rows.largest() * kRowStride;
  const Buffer<uint16_t> all_blocks(num_threads() * depth_blocks * block_size);
  const bool x_in_cache = tokens * columns * 2 <= (512 << 10);
  for_workers(rows.blocks, [&](int64_t worker, const auto& next) {
    uint16_t* blocks = all_blocks.get() + worker * depth_blocks * block_size;
    Ahead ahead;
    for (int64_t task; (task = next()) < rows.blocks;) {
      const int64_t first = rows.begin(task), count = rows.end(task) - first;
      for (int64_t block = 0; block < depth_blocks; ++block) {
        pack_transposed_block(blocks + block * block_size, elements(grad_output, block * kDepth, first),
                              grad_output.row_stride, depth_of(block), count);
      }
      const auto tile = [&](int64_t begin, int64_t end, int64_t c) {
        alignas(64) float sum[kTileRows * kTileColumns] = {};
        for (int64_t block = 0; block < depth_blocks; ++block) {
          const int64_t pairs = divide_up(depth_of(block), 2);
          multiply(sum, kTileColumns, blocks + block * block_size + begin * kRowStride,
                   panels.get() + (block * column_tiles + c / kTileColumns) * panel, end - begin, columns - c, pairs,
                   block > 0, ahead.take());
        }
        store_score_grad(grad, sum, first + begin, end - begin, c);
      };
      if (x_in_cache) {
        for_tile_rows(count, [&](int64_t begin, int64_t end) {
          for (int64_t c = 0; c < columns; c += kTileColumns) {
            prefetch_score_grad(grad, first + begin, end - begin, c + 2 * kTileColumns);
            tile(begin, end, c);
          }
        });
      } else {
        for (int64_t c = 0; c < columns; c += kTileColumns) {
          ahead.start_block(0, kDepth / 2);
          for (int64_t block = 0; block < depth_blocks; ++block) {
            ahead.add_soon(panels.get() + (block * column_tiles + c / kTileColumns + 1) * panel, panel * 4);
          }
          for_tile_rows(count, [&](int64_t begin, int64_t end) {
            prefetch_score_grad(grad, first + begin, end - begin, c);
            tile(begin, end, c);
          });
        }
      }
    }
    finish_streams();
  });
}

}  // namespace
}  // namespace bfloat16

const FusedLinear& fused_linear() {
  static const FusedLinear table = {bfloat16::masked_linear, bfloat16::grad_x, bfloat16::grad_scores};
  return table;
}

}  // namespace mft
