// The score gradient by our own GEMM (gemm.h). A tile of grad_output.T @ x never leaves the cache: weight and sign are
// multiplied in when its sum is complete. x is packed once per call. Each block of grad_output's columns is packed
// once, by the thread that takes it.
#include "fused_linear.h"

#include "fused_parts.h"
#include "huge_pages.h"

namespace mft {
namespace {

// An output larger than this is written around the cache. New memory is not, because the operating system has just
// brought it into the cache to clear it. 64 experts of 2048 x 2048 and 2048 x 1024, 64 tokens, from scores, ms per
// step: 506 around the cache, 378 through it, 312 with pages mapped block by block.
constexpr int64_t kCacheBytes = 16 << 20;

// All of x as B panels of 32 columns, one block of the depth after the other. The depth is the tokens.
class PackedTokens {
 public:
  PackedTokens(const Gemm& gemm, const Matrix& x)
      : depth{x.rows, gemm.per_group},
        tiles(divide_up(x.columns, kTileColumns)),
        size(round_up(std::min(divide_up(x.rows, gemm.per_group), kDepth), kDepthStep) * kTileColumns),
        panels_(depth.blocks() * tiles * size) {
    parallel_for(0, divide_up(x.rows, gemm.per_group), 8, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t block = g / kDepth, token = g * gemm.per_group;
        uint32_t* b = panels_.get() + block * tiles * size;
        gemm.pack_group(b + (g - block * kDepth) * kTileColumns, size, at(x, token),
                        token + 1 < x.rows ? at(x, token + 1) : nullptr, x.columns);
        if (token + gemm.per_group >= x.rows) fill_depth(b, size, depth.groups(block), x.columns);
      }
    });
  }
  const uint32_t* panel(int64_t block, int64_t tile) const { return panels_.get() + (block * tiles + tile) * size; }

  const Depth depth;
  const int64_t tiles, size;  // size of a panel

 private:
  const Buffer<uint32_t> panels_;
};

// The order in which a thread computes the tiles of its rows: `abreast` tiles side by side, one group of rows after the
// other. If the depth has several blocks, the thread may take block after block and keep the tiles' sums in between.
struct Order {
  bool by_blocks;
  int64_t abreast, ahead;  // tiles side by side; columns from a tile to what is prefetched for a later one

  Order(const Gemm& gemm, const Matrix& x, const PackedTokens& packed)
      : by_blocks(gemm.tiles_by_blocks > 0 && packed.depth.blocks() > 1) {
    const bool x_in_cache = x.rows * x.columns * bytes_of(x.format) <= (512 << 10);
    const int64_t panels_bytes = std::max<int64_t>(packed.depth.blocks() * packed.size * 4, 1);
    const int64_t cached = x_in_cache ? packed.tiles : std::max<int64_t>(gemm.panels_bytes / panels_bytes, 1);
    abreast = std::min(by_blocks ? gemm.tiles_by_blocks : cached, packed.tiles);
    ahead = gemm.factors_ahead > 0 ? gemm.factors_ahead : x_in_cache ? 2 * kTileColumns : 0;
  }
};

// One thread's work: its blocks of grad_output's columns, which are rows of the result.
class Worker {
 public:
  Worker(const Gemm& gemm, const ScoreGrad& grad, const PackedTokens& x, const Order& order, uint32_t* blocks,
         int64_t block_size, float* sums, int64_t sum_rows)
      : gemm_(gemm),
        grad_(grad),
        x_(x),
        order_(order),
        blocks_(blocks),
        block_size_(block_size),
        sums_(sums),
        sum_rows_(sum_rows),
        ahead_(gemm),
        session_(gemm) {}

  void make_rows(const Matrix& grad_output, int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    for (int64_t block = 0; block < x_.depth.blocks(); ++block) {
      gemm_.pack_transposed_block(blocks_ + block * block_size_, at(grad_output, x_.depth.first(block), first),
                                  grad_output.row_stride, x_.depth.length(block), count);
    }
    for (int64_t tile = 0; tile < x_.tiles; tile += order_.abreast) {
      begin_ = tile;
      end_ = std::min(tile + order_.abreast, x_.tiles);
      if (order_.by_blocks) add_all_blocks_but_the_last();
      finish_tiles();
    }
  }

 private:
  float* sum_at(int64_t tile, int64_t row) const {
    return order_.by_blocks ? sums_ + ((tile - begin_) * sum_rows_ + row) * kTileColumns : sums_;
  }

  void add_block(int64_t block, int64_t tile, int64_t begin, int64_t end) {
    gemm_.multiply(sum_at(tile, begin), kTileColumns, blocks_ + block * block_size_ + begin * kRowStride,
                   x_.panel(block, tile), end - begin, grad_.columns - tile * kTileColumns, x_.depth.groups(block),
                   block > 0, ahead_.take());
  }

  void add_all_blocks_but_the_last() {
    for (int64_t block = 0; block + 1 < x_.depth.blocks(); ++block) {
      for (int64_t t = begin_; t < end_; ++t) {
        ahead_.start_block(0, kDepth);
        ahead_.add_soon(t + 1 < end_ ? x_.panel(block, t + 1) : x_.panel(block + 1, begin_), x_.size * 4);
        for_tile_rows(gemm_, gemm_.tile_rows, count_, [&](int64_t begin, int64_t end) { add_block(block, t, begin, end); });
      }
    }
  }

  // Adds the last block of the depth, or all blocks if sums are not kept. Then multiplies by weight and sign.
  void finish_tiles() {
    const int64_t blocks = x_.depth.blocks();
    ahead_.start_block(0, kDepth);
    for (int64_t block = 0; !order_.by_blocks && block < blocks; ++block) {
      ahead_.add_soon(x_.panel(block, end_), std::min(order_.abreast, x_.tiles - end_) * x_.size * 4);
    }
    for_tile_rows(gemm_, gemm_.factor_rows, count_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin_; t < end_; ++t) {
        const int64_t later = t * kTileColumns + order_.ahead;
        gemm_.prefetch_score_grad(grad_, first_ + begin, end - begin, later,
                                  std::min(kTileColumns, end_ * kTileColumns - later));
        for (int64_t block = order_.by_blocks ? blocks - 1 : 0; block < blocks; ++block) {
          add_block(block, t, begin, end);
        }
        if (blocks == 0) std::memset(sums_, 0, kMostTileRows * kTileColumns * sizeof *sums_);
        gemm_.store_score_grad(grad_, sum_at(t, begin), first_ + begin, end - begin, t * kTileColumns);
      }
    });
  }

  const Gemm& gemm_;
  const ScoreGrad& grad_;
  const PackedTokens& x_;
  const Order& order_;
  uint32_t* const blocks_;  // of grad_output, one for each block of the depth
  const int64_t block_size_;
  float* const sums_;  // of one tile, or of order_.abreast tiles with sum_rows_ rows each
  const int64_t sum_rows_;
  Ahead ahead_;
  const Session session_;
  int64_t first_ = 0, count_ = 0;  // the rows of the result
  int64_t begin_ = 0, end_ = 0;    // the tiles side by side
};

}  // namespace

void fused_grad_scores(const Gemm& gemm, const Matrix& out, const Matrix& grad_output, const Matrix& x,
                       const Matrix& weight, const SignSource& sign, bool accumulate, bool fresh) {
  const PackedTokens packed(gemm, x);
  const int64_t out_bytes = out.columns * bytes_of(out.format);
  const bool stream = !accumulate && out.rows * out_bytes > kCacheBytes && !fresh && out_bytes % 64 == 0 &&
                      reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
  const ScoreGrad grad{out.data,   out.format, weight.data, sign.scores, sign.score_format,
                       sign.words, x.columns,  accumulate,  stream};
  const Order order(gemm, x, packed);
  const Cut rows(weight.rows, gemm.weight_rows, gemm.whole_tiles ? gemm.tile_rows : 1);
  const int64_t most_rows = round_up(rows.largest(), kMostTileRows), block_size = most_rows * kRowStride;
  const int64_t sums_size = (order.by_blocks ? order.abreast * most_rows : kMostTileRows) * kTileColumns;
  const Buffer<uint32_t> all_blocks(num_threads() * packed.depth.blocks() * block_size);
  const Buffer<float> all_sums(num_threads() * sums_size);
  for_workers(rows.blocks, [&](int64_t index, const auto& next) {
    Worker worker(gemm, grad, packed, order, all_blocks.get() + index * packed.depth.blocks() * block_size, block_size,
                  all_sums.get() + index * sums_size, most_rows);
    for (int64_t task; (task = next()) < rows.blocks;) {
      const int64_t first = rows.begin(task), count = rows.end(task) - first;
      if (fresh) map_pages(out.row(first), count * out_bytes);
      worker.make_rows(grad_output, first, count);
    }
    gemm.finish_streams();
  });
}

}  // namespace mft
