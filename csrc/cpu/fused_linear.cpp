// The masked linear layer and its score gradient, the mask fused into the packing of a GEMM (gemm.h).
//
// The activations are packed once a call. Then each thread takes blocks of the weight: it masks a block of the weight
// into its own cache while it packs it, multiplies, and meanwhile brings in the next block. Sums run in fp32 over the
// whole inner dimension, in an order that depends on neither the threads nor the cut into blocks.
#include "fused_linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "slab.h"

namespace mft {
namespace {

constexpr int64_t kSumBytes = 4 << 20;     // of the sums of d_x, a thread
constexpr int64_t kTilesAbreast = 16;      // 1 KB of a bf16 row
constexpr int64_t kCacheBytes = 16 << 20;  // an output beyond this is written around the cache

int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t elements) : scratch_(elements * sizeof(T) + 64) {}
  T* get() const { return static_cast<T*>(scratch_.get()); }

 private:
  Scratch scratch_;
};

char* at(const Matrix& m, int64_t row, int64_t column = 0) { return m.row(row) + column * bytes_of(m.format); }

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

// f(begin, end) of the rows of each tile: nearly equal numbers, or as many as a whole tile takes.
template <typename F>
void for_tile_rows(const Gemm& gemm, int64_t rows, const F& f) {
  const int64_t tiles = divide_up(rows, gemm.tile_rows);
  const auto begin = [&](int64_t t) {
    return gemm.whole_tiles ? std::min(rows, t * gemm.tile_rows) : rows * t / tiles;
  };
  for (int64_t t = 0; t < tiles; ++t) f(begin(t), begin(t + 1));
}

// The addresses that multiply() brings into L2 while it works on something else: what the next tiles read at once, and
// the weight and scores of the next block towards the end of this one, lest the tiles between push them out again.
class Ahead {
 public:
  explicit Ahead(const Gemm& gemm) : gemm_(gemm) {}

  // Before the first of `calls` multiplications of `groups` groups.
  void start_block(int64_t calls, int64_t groups) {
    soon_.clear();
    late_.clear();
    next_soon_ = next_late_ = 0;
    calls_left_ = calls;
    per_call_ = gemm_.prefetch_groups == 0 ? 0 : groups / gemm_.prefetch_groups;
  }

  void add_soon(const void* from, int64_t bytes) { add(soon_, from, bytes); }

  // Rows of the weight, and of the scores where the mask comes from them.
  void add_late(const Matrix& weight, const MaskSource& mask, int64_t row, int64_t end_row, int64_t column,
                int64_t columns) {
    for (int64_t r = row; r < end_row; ++r) {
      add(late_, at(weight, r, column), columns * bytes_of(weight.format));
      if (mask.scores != nullptr) add(late_, mask.row(r, column).scores, columns * bytes_of(mask.score_format));
    }
  }

  // What the next multiplication takes along, or nullptr.
  const char* const* take() {
    const int64_t calls_left = calls_left_--;
    if (const auto* found = take(soon_, next_soon_)) return found;
    const int64_t late = static_cast<int64_t>(late_.size() - next_late_);
    // With all threads at a line a group, memory is at its limit: ask at half that rate where there is time.
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

// The depth of a product in groups, cut into blocks of kDepth; in packed operands each block is filled up with zeros.
struct Depth {
  int64_t elements, per_group;
  int64_t block_elements() const { return kDepth * per_group; }
  int64_t blocks() const { return divide_up(elements, block_elements()); }
  int64_t first(int64_t block) const { return block * block_elements(); }
  int64_t length(int64_t block) const { return std::min(block_elements(), elements - first(block)); }
  int64_t groups(int64_t block) const { return divide_up(length(block), per_group); }
  int64_t packed_groups(int64_t block) const { return round_up(groups(block), kDepthStep); }
};

// Zeros for the groups from `groups` on up to a whole step, in panels that lie panel_stride apart.
void fill_depth(uint32_t* b, int64_t panel_stride, int64_t groups, int64_t columns) {
  const int64_t missing = round_up(groups, kDepthStep) - groups;
  for (int64_t c = 0; missing > 0 && c < columns; c += kTileColumns, b += panel_stride) {
    std::memset(b + groups * kTileColumns, 0, missing * kTileColumns * sizeof *b);
  }
}

// A thread's turn at the table's instructions.
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

// Prefetches part of a row of the weight, and of its scores.
void prefetch_row(const Matrix& weight, const MaskSource& mask, int64_t row, int64_t column, int64_t columns) {
  const auto bring = [&](const void* from, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(from) + b, 0, 2);
  };
  bring(at(weight, row, column), columns * bytes_of(weight.format));
  if (mask.scores != nullptr) bring(mask.row(row, column).scores, columns * bytes_of(mask.score_format));
}

// The forward where all of packed x stays in the cache: as many rows of the weight as a tile has, for all tokens at once.
template <typename PanelAt>
void multiply_narrow(const Gemm& gemm, const Matrix& y, const Matrix& weight, const MaskSource& mask, const void* bias,
                     const Depth& depth, const PanelAt& panel_at) {
  const Cut rows(weight.rows, gemm.tile_rows, gemm.whole_tiles ? gemm.tile_rows : 1);
  const int64_t sum_stride = round_up(y.rows, kTileColumns), sums_size = gemm.tile_rows * sum_stride;
  const int64_t block_size = gemm.tile_rows * kRowStride;
  const Buffer<uint32_t> all_blocks(num_threads() * block_size);
  const Buffer<float> all_sums(num_threads() * sums_size);
  for_workers(rows.blocks, [&](int64_t worker, const auto& next) {
    uint32_t* a = all_blocks.get() + worker * block_size;
    float* sums = all_sums.get() + worker * sums_size;
    const Session session(gemm);
    for (int64_t task; (task = next()) < rows.blocks;) {
      const int64_t first = rows.begin(task), count = rows.end(task) - first;
      for (int64_t block = 0; block < depth.blocks(); ++block) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t later = r + gemm.rows_ahead, over = later >= count;  // the same rows come in the next block
          if (block + over < depth.blocks()) {
            prefetch_row(weight, mask, first + later % count, depth.first(block + over), depth.length(block + over));
          }
          gemm.pack_masked_row(a + r * kRowStride, at(weight, first + r, depth.first(block)),
                               mask.row(first + r, depth.first(block)), mask.score_format, depth.length(block));
        }
        for (int64_t token = 0; token < y.rows; token += kTileColumns) {
          gemm.multiply(sums + token, sum_stride, a, panel_at(block, token / kTileColumns), count, y.rows - token,
                        depth.groups(block), block > 0, nullptr);
        }
      }
      gemm.store_transposed(at(y, 0, first), y.row_stride, sums, sum_stride, count, y.rows,
                            bias != nullptr ? static_cast<const char*>(bias) + first * bytes_of(y.format) : nullptr);
    }
  });
}

}  // namespace

// y.T tile = masked weight @ x.T: the weight's rows are rows of A as they lie in memory, and x.T is packed once.
void fused_masked_linear(const Gemm& gemm, const Matrix& y, const Matrix& x, const Matrix& weight,
                         const MaskSource& mask, const void* bias) {
  const int64_t tokens = x.rows, token_tiles = divide_up(tokens, kTileColumns);
  const Depth depth{x.columns, gemm.per_group};
  const auto panel_size = [&](int64_t block) { return depth.packed_groups(block) * kTileColumns; };
  const Buffer<uint32_t> panels(((depth.blocks() - 1) * kDepth * kTileColumns + panel_size(depth.blocks() - 1)) *
                                token_tiles);
  const auto panel_at = [&](int64_t block, int64_t tile) {
    return panels.get() + block * token_tiles * kDepth * kTileColumns + tile * panel_size(block);
  };
  parallel_for(0, depth.blocks() * token_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / token_tiles, tile = i % token_tiles, first = tile * kTileColumns;
      gemm.pack_transposed_panel(panel_at(block, tile), at(x, first, depth.first(block)), x.row_stride,
                                 std::min(kTileColumns, tokens - first), depth.length(block));
    }
  });

  if (token_tiles * kTileColumns * x.columns * bytes_of(x.format) <= gemm.narrow_bytes) {
    multiply_narrow(gemm, y, weight, mask, bias, depth, panel_at);
    return;
  }
  const Cut rows(weight.rows, gemm.weight_rows, gemm.whole_tiles ? gemm.tile_rows : 1);
  const int64_t chunk = std::min(round_up(tokens, kTileColumns), gemm.tokens);
  const int64_t block_rows = round_up(rows.largest(), gemm.tile_rows);
  const int64_t tiles_size = block_rows * kTileColumns;  // of the sums of 32 tokens, each row in 128 B
  const int64_t sums_size = divide_up(chunk, kTileColumns) * tiles_size, block_size = block_rows * kRowStride;
  const int64_t workers = num_threads();
  const Buffer<float> all_sums(workers * sums_size);
  const Buffer<uint32_t> all_blocks(workers * block_size);
  for_workers(rows.blocks, [&](int64_t worker, const auto& next) {
    float* sums = all_sums.get() + worker * sums_size;
    uint32_t* a = all_blocks.get() + worker * block_size;
    Ahead ahead(gemm);
    const Session session(gemm);
    for (int64_t task = next(), upcoming; task < rows.blocks; task = upcoming) {
      upcoming = next();
      const int64_t first = rows.begin(task), count = rows.end(task) - first;
      for (int64_t token = 0; token < tokens; token += chunk) {
        const int64_t here = std::min(chunk, tokens - token);
        for (int64_t block = 0; block < depth.blocks(); ++block) {
          for (int64_t r = 0; r < count; ++r) {
            if (gemm.rows_ahead > 0 && r + gemm.rows_ahead < count) {
              prefetch_row(weight, mask, first + r + gemm.rows_ahead, depth.first(block), depth.length(block));
            }
            gemm.pack_masked_row(a + r * kRowStride, at(weight, first + r, depth.first(block)),
                                 mask.row(first + r, depth.first(block)), mask.score_format, depth.length(block));
          }
          ahead.start_block(divide_up(here, kTileColumns) * divide_up(count, gemm.tile_rows), depth.groups(block));
          if (block + 1 < depth.blocks()) {
            ahead.add_late(weight, mask, first, first + count, depth.first(block + 1), depth.length(block + 1));
          } else if (token + chunk >= tokens && upcoming < rows.blocks) {
            ahead.add_late(weight, mask, rows.begin(upcoming), rows.end(upcoming), 0, depth.length(0));
          }
          for (int64_t t = 0; t < here; t += kTileColumns) {
            const uint32_t* b = panel_at(block, (token + t) / kTileColumns);
            ahead.add_soon(b + panel_size(block), panel_size(block) * 4);
            float* tiles = sums + t / kTileColumns * tiles_size;
            for_tile_rows(gemm, count, [&](int64_t begin, int64_t end) {
              gemm.prefetch_tile(tiles + end * kTileColumns, kTileColumns, gemm.tile_rows);
              gemm.multiply(tiles + begin * kTileColumns, kTileColumns, a + begin * kRowStride, b, end - begin, here - t,
                            depth.groups(block), block > 0, ahead.take());
            });
          }
        }
        for (int64_t t = 0; t < here; t += kTileColumns) {
          gemm.store_transposed(at(y, token + t, first), y.row_stride, sums + t / kTileColumns * tiles_size, kTileColumns,
                                count, std::min(kTileColumns, here - t),
                                bias != nullptr ? static_cast<const char*>(bias) + first * bytes_of(y.format) : nullptr);
        }
      }
    }
  });
}

// d_x tile = grad_output @ masked weight: grad_output is packed once, groups of the weight's rows become panels.
void fused_grad_x(const Gemm& gemm, const Matrix& d_x, const Matrix& grad_output, const Matrix& weight,
                  const MaskSource& mask) {
  const int64_t tokens = grad_output.rows;
  const Depth depth{weight.rows, gemm.per_group};
  const int64_t block_size = tokens * kRowStride;
  const Buffer<uint32_t> blocks(depth.blocks() * block_size + gemm.tile_rows * kRowStride);
  parallel_for(0, depth.blocks() * tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tokens, token = i % tokens;
      gemm.pack_row(blocks.get() + i * kRowStride, at(grad_output, token, depth.first(block)), depth.length(block));
    }
  });

  // A task takes whole pages of the weight's rows as long as its sums fit the cache; it masks them in pieces.
  const int64_t chunk = std::max<int64_t>(1, std::min(tokens, gemm.grad_tokens));
  const int64_t fitting = kSumBytes / 4 / chunk / gemm.weight_columns * gemm.weight_columns;
  const Cut columns(weight.columns, std::min(gemm.task_columns, std::max(fitting, gemm.weight_columns)), kTileColumns);
  const int64_t panel = gemm.grad_depth * kTileColumns + kTileColumns;
  const int64_t tiles_size = round_up(chunk, gemm.tile_rows) * kTileColumns;  // of the sums of 32 columns, each row in 128 B
  const int64_t sums_size = divide_up(columns.largest(), kTileColumns) * tiles_size;
  const int64_t panels_size = gemm.weight_columns / kTileColumns * panel;
  const int64_t depth_rows = gemm.grad_depth * gemm.per_group;
  const int64_t workers = num_threads();
  const Buffer<float> all_sums(workers * sums_size);
  const Buffer<uint32_t> all_panels(workers * panels_size);
  for_workers(columns.blocks, [&](int64_t worker, const auto& next) {
    float* sums = all_sums.get() + worker * sums_size;
    uint32_t* panels = all_panels.get() + worker * panels_size;
    Ahead ahead(gemm);
    const Session session(gemm);
    for (int64_t task; (task = next()) < columns.blocks;) {
      const int64_t first = columns.begin(task), end_column = columns.end(task);
      for (int64_t token = 0; token < tokens; token += chunk) {
        const int64_t here = std::min(chunk, tokens - token);
        for (int64_t row = 0; row < weight.rows; row += depth_rows) {
          const int64_t end_row = std::min(weight.rows, row + depth_rows);
          const int64_t groups = divide_up(end_row - row, gemm.per_group);
          const uint32_t* a = blocks.get() + row / depth.block_elements() * block_size + token * kRowStride +
                              row % depth.block_elements() / gemm.per_group;
          for (int64_t column = first; column < end_column; column += gemm.weight_columns) {
            const int64_t count = std::min(gemm.weight_columns, end_column - column);
            for (int64_t r = row; r < end_row; r += gemm.per_group) {
              const int64_t odd = std::min(r + 1, end_row - 1);
              for (int64_t i = r; gemm.rows_ahead > 0 && i < r + gemm.per_group; ++i) {
                const int64_t later = std::min(i + 2 * gemm.rows_ahead, end_row - 1);
                prefetch_row(weight, mask, later, column, count);
              }
              gemm.pack_masked_group(panels + (r - row) / gemm.per_group * kTileColumns, panel,
                                     at(weight, r, column), r + 1 < end_row ? at(weight, odd, column) : nullptr,
                                     mask.row(r, column), mask.row(odd, column), mask.score_format, count);
            }
            fill_depth(panels, panel, groups, count);
            ahead.start_block(divide_up(here, gemm.tile_rows) * divide_up(count, kTileColumns), groups);
            if (column + count < end_column) {
              ahead.add_late(weight, mask, row, end_row, column + count,
                             std::min(gemm.weight_columns, end_column - column - count));
            } else {
              ahead.add_late(weight, mask, end_row, std::min(weight.rows, end_row + depth_rows), first,
                             std::min(gemm.weight_columns, end_column - first));
            }
            for (int64_t c = 0; c < count; c += kTileColumns) {
              const uint32_t* b = panels + c / kTileColumns * panel;
              float* tiles = sums + (column - first + c) / kTileColumns * tiles_size;
              for_tile_rows(gemm, here, [&](int64_t begin, int64_t end) {
                for (int64_t r = end; c == 0 && r < std::min(here, end + gemm.tile_rows); ++r) {
                  ahead.add_soon(a + r * kRowStride, 4 * groups);
                }
                gemm.prefetch_tile(tiles + end * kTileColumns, kTileColumns, gemm.tile_rows);
                gemm.multiply(tiles + begin * kTileColumns, kTileColumns, a + begin * kRowStride, b, end - begin,
                              count - c, groups, row > 0, ahead.take());
              });
            }
          }
        }
        for (int64_t t = 0; t < here; ++t) {
          for (int64_t c = first; c < end_column; c += kTileColumns) {
            gemm.store_row(at(d_x, token + t, c), sums + (c - first) / kTileColumns * tiles_size + t * kTileColumns,
                           std::min(kTileColumns, end_column - c));
          }
        }
      }
    }
  });
}

// A tile of grad_output.T @ x never leaves the cache: weight and sign are multiplied in when its sum is complete.
void fused_grad_scores(const Gemm& gemm, const Matrix& out, const Matrix& grad_output, const Matrix& x,
                       const Matrix& weight, const SignSource& sign, bool accumulate) {
  const int64_t columns = x.columns, column_tiles = divide_up(columns, kTileColumns);
  const Depth depth{x.rows, gemm.per_group};
  const int64_t panel = round_up(std::min(divide_up(x.rows, gemm.per_group), kDepth), kDepthStep) * kTileColumns;
  const Buffer<uint32_t> panels(depth.blocks() * column_tiles * panel);
  parallel_for(0, divide_up(x.rows, gemm.per_group), 8, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t block = g / kDepth, token = g * gemm.per_group;
      uint32_t* b = panels.get() + block * column_tiles * panel;
      gemm.pack_group(b + (g - block * kDepth) * kTileColumns, panel, at(x, token),
                      token + 1 < x.rows ? at(x, token + 1) : nullptr, columns);
      if (token + gemm.per_group >= x.rows) fill_depth(b, panel, depth.groups(block), columns);
    }
  });

  const int64_t out_bytes = out.columns * bytes_of(out.format);
  const bool stream = !accumulate && out.rows * out_bytes > kCacheBytes && out_bytes % 64 == 0 &&
                      reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
  const ScoreGrad grad{out.data,   out.format, weight.data, sign.scores, sign.score_format,
                       sign.words, columns,    accumulate,  stream};
  const Cut rows(weight.rows, gemm.weight_rows, gemm.whole_tiles ? gemm.tile_rows : 1);
  const int64_t block_size = round_up(rows.largest(), kMostTileRows) * kRowStride;
  const Buffer<uint32_t> all_blocks(num_threads() * depth.blocks() * block_size);
  // So many tiles side by side pass all rows before the next ones do: their panels stay in the cache meanwhile. Where
  // the depth has several blocks these pass one after the other, and the tiles' sums are kept between them.
  const bool by_blocks = gemm.tiles_by_blocks > 0 && depth.blocks() > 1;
  const bool x_in_cache = x.rows * columns * bytes_of(x.format) <= (512 << 10);
  const int64_t panels_bytes = std::max<int64_t>(depth.blocks() * panel * 4, 1);
  int64_t abreast = std::clamp<int64_t>(gemm.panels_bytes / panels_bytes, 1, kTilesAbreast);
  if (by_blocks) abreast = gemm.tiles_by_blocks;
  if (!by_blocks && gemm.panels_bytes == 0 && x_in_cache) abreast = column_tiles;
  abreast = std::min(abreast, column_tiles);
  const int64_t tile_stride = by_blocks ? round_up(rows.largest(), kMostTileRows) * kTileColumns : 0;
  const int64_t sums_size = std::max(abreast * tile_stride, kMostTileRows * kTileColumns);
  const Buffer<float> all_sums(num_threads() * sums_size);
  for_workers(rows.blocks, [&](int64_t worker, const auto& next) {
    uint32_t* blocks = all_blocks.get() + worker * depth.blocks() * block_size;
    float* sums = all_sums.get() + worker * sums_size;
    Ahead ahead(gemm);
    const Session session(gemm);
    for (int64_t task; (task = next()) < rows.blocks;) {
      const int64_t first = rows.begin(task), count = rows.end(task) - first;
      for (int64_t block = 0; block < depth.blocks(); ++block) {
        gemm.pack_transposed_block(blocks + block * block_size, at(grad_output, depth.first(block), first),
                                   grad_output.row_stride, depth.length(block), count);
      }
      for (int64_t tile = 0; tile < column_tiles; tile += abreast) {
        const int64_t end_tile = std::min(tile + abreast, column_tiles);
        const auto panel_at = [&](int64_t block, int64_t t) { return panels.get() + (block * column_tiles + t) * panel; };
        const auto sum_at = [&](int64_t t, int64_t row) {
          return by_blocks ? sums + (t - tile) * tile_stride + row * kTileColumns : sums;
        };
        const auto add_block = [&](int64_t block, int64_t t, int64_t begin, int64_t end) {
          gemm.multiply(sum_at(t, begin), kTileColumns, blocks + block * block_size + begin * kRowStride,
                        panel_at(block, t), end - begin, columns - t * kTileColumns, depth.groups(block), block > 0,
                        ahead.take());
        };
        for (int64_t block = 0; by_blocks && block + 1 < depth.blocks(); ++block) {
          for (int64_t t = tile; t < end_tile; ++t) {
            ahead.start_block(0, kDepth);
            ahead.add_soon(t + 1 < end_tile ? panel_at(block, t + 1) : panel_at(block + 1, tile), panel * 4);
            for_tile_rows(gemm, count, [&](int64_t begin, int64_t end) { add_block(block, t, begin, end); });
          }
        }
        ahead.start_block(0, kDepth);
        for (int64_t block = 0; !by_blocks && !x_in_cache && block < depth.blocks(); ++block) {
          ahead.add_soon(panel_at(block, end_tile), std::min(abreast, column_tiles - end_tile) * panel * 4);
        }
        for_tile_rows(gemm, count, [&](int64_t begin, int64_t end) {
          for (int64_t t = tile; t < end_tile; ++t) {
            const int64_t column = t * kTileColumns;
            if (gemm.panels_bytes == 0) {
              gemm.prefetch_score_grad(grad, first + begin, end - begin, x_in_cache ? column + 2 * kTileColumns : column,
                                       kTileColumns);
            } else {  // a share of what the tiles of the next rows read: row by row, as it lies in memory
              const int64_t share = divide_up(gemm.tile_rows, abreast), row = end + (t - tile) * share;
              gemm.prefetch_score_grad(grad, first + row, std::min(share, count - row), tile * kTileColumns,
                                       abreast * kTileColumns);
            }
            for (int64_t block = by_blocks ? depth.blocks() - 1 : 0; block < depth.blocks(); ++block) {
              add_block(block, t, begin, end);
            }
            if (depth.blocks() == 0) std::memset(sums, 0, kMostTileRows * kTileColumns * sizeof *sums);
            gemm.store_score_grad(grad, sum_at(t, begin), first + begin, end - begin, column);
          }
        });
      }
    }
    gemm.finish_streams();
  });
}

}  // namespace mft
