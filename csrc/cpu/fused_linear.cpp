// The masked linear layer and its score gradient in bf16, the mask fused into the packing of a GEMM (gemm_bfloat16.h).
//
// The activations are packed once a call. Then each thread takes blocks of the weight: it masks a block of the weight
// into its own cache while it packs it, multiplies, and meanwhile brings in the next block. Sums run in fp32 over the
// whole inner dimension, in an order that depends on neither the threads nor the cut into blocks.
#include "fused_linear.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "gemm_bfloat16.h"

namespace mft {
namespace bfloat16 {
namespace {

constexpr int64_t kWeightRows = 96;      // rows of the weight in a block: 8 tiles, 104 KB a depth of 512 packed
constexpr int64_t kWeightColumns = 512;  // columns of it in a block of d_x
constexpr int64_t kGradDepth = 256;      // rows of it in a block of d_x: 256 KB packed, 512 KB of raw W and S ahead
constexpr int64_t kTokens = 2048;        // the fp32 sums of a block are kept for so many tokens
constexpr int64_t kCacheBytes = 16 << 20;  // an output beyond this is written around the cache

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

template <typename T>
Buffer<T> make_buffer(int64_t elements) {
  return Buffer<T>(static_cast<T*>(::operator new(elements * sizeof(T) + 64, std::align_val_t{64})));
}

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
    const int64_t units = divide_up(total, unit), threads = torch::stable::get_num_threads();
    blocks = std::max<int64_t>(1, std::min(round_up(blocks, threads), units));
  }
  int64_t begin(int64_t block) const { return std::min(total, divide_up(total, unit) * block / blocks * unit); }
  int64_t end(int64_t block) const { return begin(block + 1); }
  int64_t largest() const { return round_up(divide_up(total, blocks), unit) + unit; }
};

// f(worker, next) on all threads; next() hands out 0 .. tasks - 1, then `tasks`.
template <typename F>
void for_workers(int64_t tasks, const F& f) {
  std::atomic<int64_t> task{0}, worker{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    f(worker++, [&task, tasks] { return std::min(task++, tasks); });
  });
}

// f(begin, end) of nearly equal groups of at most 12 rows.
template <typename F>
void for_tile_rows(int64_t rows, const F& f) {
  const int64_t tiles = divide_up(rows, kTileRows);
  for (int64_t t = 0; t < tiles; ++t) f(rows * t / tiles, rows * (t + 1) / tiles);
}

// The addresses that multiply() brings in while it works on something else.
class Ahead {
 public:
  void clear() {
    addresses_.clear();
    next_ = 0;
  }

  void add(const void* from, int64_t bytes) {
    const char* p = static_cast<const char*>(from);
    for (int64_t done = 0; done < bytes; done += kPrefetchBytes) addresses_.push_back(p + done);
  }

  // Rows of the weight, and of the scores where the mask comes from them.
  void add(const Matrix& weight, const MaskSource& mask, int64_t row, int64_t end_row, int64_t column, int64_t columns) {
    for (int64_t r = row; r < end_row; ++r) {
      add(elements(weight, r, column), columns * 2);
      if (mask.scores != nullptr) add(mask.row(r, column).scores, columns * bytes_of(mask.score_format));
    }
  }

  const char* const* take(int64_t pairs) {
    const size_t count = divide_up(pairs, 16);
    if (next_ + count > addresses_.size()) return nullptr;
    next_ += count;
    return addresses_.data() + next_ - count;
  }

 private:
  std::vector<const char*> addresses_;
  size_t next_ = 0;
};

// y.T tile = masked weight @ x.T: the weight's rows are rows of A as they lie in memory, and x.T is packed once.
void masked_linear(const Matrix& y, const Matrix& x, const Matrix& weight, const MaskSource& mask, const void* bias) {
  const int64_t tokens = x.rows, depth = x.columns;
  const int64_t depth_blocks = divide_up(depth, kDepth), token_tiles = divide_up(tokens, kTileColumns);
  const int64_t panel = divide_up(std::min(depth, kDepth), 2) * kTileColumns;
  const auto panels = make_buffer<uint32_t>(depth_blocks * token_tiles * panel);
  const auto depth_of = [&](int64_t block) { return std::min(kDepth, depth - block * kDepth); };
  torch::stable::parallel_for(0, depth_blocks * token_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / token_tiles, first = i % token_tiles * kTileColumns;
      pack_transposed_panel(panels.get() + i * panel, elements(x, first, block * kDepth), x.row_stride,
                            std::min(kTileColumns, tokens - first), depth_of(block));
    }
  });

  const Cut rows(weight.rows, kWeightRows, 1);
  const int64_t chunk = std::min(round_up(tokens, kTileColumns), kTokens), sum_stride = chunk + 16;
  const int64_t sums_size = rows.largest() * sum_stride, block_size = rows.largest() * kRowStride;
  const int64_t workers = torch::stable::get_num_threads();
  const auto all_sums = make_buffer<float>(workers * sums_size);
  const auto all_blocks = make_buffer<uint16_t>(workers * block_size);
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
            uint32_t words[kDepth / 32];
            mask_words(words, mask.row(first + r, block * kDepth), mask.score_format, depth_of(block));
            pack_row(a + r * kRowStride, elements(weight, first + r, block * kDepth), words, depth_of(block));
          }
          ahead.clear();
          if (block + 1 < depth_blocks) {
            ahead.add(weight, mask, first, first + count, (block + 1) * kDepth, depth_of(block + 1));
          } else if (token + chunk >= tokens && upcoming < rows.blocks) {
            ahead.add(weight, mask, rows.begin(upcoming), rows.end(upcoming), 0, depth_of(0));
          }
          const int64_t pairs = divide_up(depth_of(block), 2);
          for (int64_t t = 0; t < here; t += kTileColumns) {
            const uint32_t* b = panels.get() + (block * token_tiles + (token + t) / kTileColumns) * panel;
            for_tile_rows(count, [&](int64_t begin, int64_t end) {
              multiply(sums + begin * sum_stride + t, sum_stride, a + begin * kRowStride, b, end - begin, here - t,
                       pairs, block > 0, ahead.take(pairs));
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
  const auto blocks = make_buffer<uint16_t>(depth_blocks * block_size);
  torch::stable::parallel_for(0, depth_blocks * tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tokens, token = i % tokens;
      pack_row(blocks.get() + i * kRowStride, elements(grad_output, token, block * kDepth), nullptr,
               std::min(kDepth, depth - block * kDepth));
    }
  });

  const Cut columns(weight.columns, kWeightColumns, kTileColumns);
  const int64_t chunk = std::min(tokens, kTokens), sum_stride = columns.largest() + 16;
  const int64_t sums_size = chunk * sum_stride, panel = kGradDepth / 2 * kTileColumns + kTileColumns;
  const int64_t panels_size = divide_up(columns.largest(), kTileColumns) * panel;
  const int64_t workers = torch::stable::get_num_threads();
  const auto all_sums = make_buffer<float>(workers * sums_size);
  const auto all_panels = make_buffer<uint32_t>(workers * panels_size);
  for_workers(columns.blocks, [&](int64_t worker, const auto& next) {
    float* sums = all_sums.get() + worker * sums_size;
    uint32_t* panels = all_panels.get() + worker * panels_size;
    Ahead ahead;
    for (int64_t task = next(), upcoming; task < columns.blocks; task = upcoming) {
      upcoming = next();
      const int64_t first = columns.begin(task), count = columns.end(task) - first;
      for (int64_t token = 0; token < tokens; token += chunk) {
        const int64_t here = std::min(chunk, tokens - token);
        for (int64_t row = 0; row < depth; row += kGradDepth) {
          const int64_t end_row = std::min(depth, row + kGradDepth), pairs = divide_up(end_row - row, 2);
          for (int64_t r = row; r < end_row; r += 2) {
            uint32_t words[2][kWeightColumns / 32 + 2];
            const bool odd = r + 1 < end_row;
            mask_words(words[0], mask.row(r, first), mask.score_format, count);
            if (odd) mask_words(words[1], mask.row(r + 1, first), mask.score_format, count);
            pack_row_pair(panels, panel, (r - row) / 2, elements(weight, r, first),
                          odd ? elements(weight, r + 1, first) : nullptr, words[0], words[1], count);
          }
          ahead.clear();
          if (end_row < depth) {
            ahead.add(weight, mask, end_row, std::min(depth, end_row + kGradDepth), first, count);
          } else if (token + chunk >= tokens && upcoming < columns.blocks) {
            ahead.add(weight, mask, 0, std::min(depth, kGradDepth), columns.begin(upcoming),
                      columns.end(upcoming) - columns.begin(upcoming));
          }
          const uint16_t* a = blocks.get() + row / kDepth * block_size + token * kRowStride + row % kDepth;
          for (int64_t c = 0; c < count; c += kTileColumns) {
            for_tile_rows(here, [&](int64_t begin, int64_t end) {
              multiply(sums + begin * sum_stride + c, sum_stride, a + begin * kRowStride,
                       panels + c / kTileColumns * panel, end - begin, count - c, pairs, row > 0, ahead.take(pairs));
            });
          }
        }
        for (int64_t t = 0; t < here; ++t) {
          store_row(mutable_elements(d_x, token + t, first), sums + t * sum_stride, count);
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
  const auto panels = make_buffer<uint32_t>(depth_blocks * column_tiles * panel);
  const auto depth_of = [&](int64_t block) { return std::min(kDepth, tokens - block * kDepth); };
  torch::stable::parallel_for(0, divide_up(tokens, 2), 8, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t block = 2 * p / kDepth;
      pack_row_pair(panels.get() + block * column_tiles * panel, panel, p - block * kDepth / 2, elements(x, 2 * p),
                    2 * p + 1 < tokens ? elements(x, 2 * p + 1) : nullptr, nullptr, nullptr, columns);
    }
  });

  const bool stream = out.rows * out.columns * bytes_of(out.format) > kCacheBytes;
  const ScoreGrad grad{out.data,          out.format, elements(weight, 0), sign.scores, sign.score_format,
                       sign.words, columns,    accumulate,          stream};
  const Cut rows(weight.rows, kWeightRows, 1);
  const int64_t block_size = rows.largest() * kRowStride;
  const auto all_blocks = make_buffer<uint16_t>(torch::stable::get_num_threads() * depth_blocks * block_size);
  const bool x_in_cache = tokens * columns * 2 <= (512 << 10);
  for_workers(rows.blocks, [&](int64_t worker, const auto& next) {
    uint16_t* blocks = all_blocks.get() + worker * depth_blocks * block_size;
    for (int64_t task; (task = next()) < rows.blocks;) {
      const int64_t first = rows.begin(task), count = rows.end(task) - first;
      for (int64_t block = 0; block < depth_blocks; ++block) {
        pack_transposed_block(blocks + block * block_size, elements(grad_output, block * kDepth, first),
                              grad_output.row_stride, depth_of(block), count);
      }
      const auto prefetch_tile = [&](int64_t begin, int64_t end, int64_t c) {
        for (int64_t r = begin; r < end; ++r) prefetch_score_grad(grad, first + r, c);
      };
      const auto tile = [&](int64_t begin, int64_t end, int64_t c) {
        alignas(64) float sum[kTileRows * kTileColumns] = {};
        for (int64_t block = 0; block < depth_blocks; ++block) {
          multiply(sum, kTileColumns, blocks + block * block_size + begin * kRowStride,
                   panels.get() + (block * column_tiles + c / kTileColumns) * panel, end - begin, columns - c,
                   divide_up(depth_of(block), 2), block > 0, nullptr);
        }
        for (int64_t r = begin; r < end; ++r) {
          store_score_grad(grad, sum + (r - begin) * kTileColumns, first + r, c, std::min(kTileColumns, columns - c));
        }
      };
      if (x_in_cache) {
        for_tile_rows(count, [&](int64_t begin, int64_t end) {
          for (int64_t c = 0; c < columns; c += kTileColumns) {
            prefetch_tile(begin, end, c + 2 * kTileColumns);
            tile(begin, end, c);
          }
        });
      } else {
        for (int64_t c = 0; c < columns; c += kTileColumns) {
          for_tile_rows(count, [&](int64_t begin, int64_t end) {
            prefetch_tile(begin, end, c);
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
