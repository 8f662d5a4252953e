// G = grad_output.T @ x by mma.sync, never stored: d_scores = [d_scores +] G [* weight] * sign,
// d_weight = keep ? G : 0.
//
//          features            d_scores, d_weight (features N, columns K): one block per tile of 128 x 128, 8 warps of
//         +--------+           2 x 4, 64 x 32 each
//  tokens | grad   |
//         +--------+           grad_output and x stream through shared memory in 3 or 4 stages of 32 tokens (cp.async);
//         +--------+           both have the depth as rows, so both go through ldmatrix.trans.
//  tokens | x      |
//         +--------+           Then one half of G at a time lies in the same memory in fp32. Each thread finishes 8
//          columns             neighbours of a row at a time: weight, scores and d_scores are accessed by 16 bytes.
//
// Two blocks share a multiprocessor: with 4 stages in 164 KiB and more, with 3 in the 100 KiB of 8.6, 8.9 and 12.0. If
// a block's memory took all of G (64 KiB), only one block would fit there. Speed: not measured.
//
// A small weight gives too few tiles for a GPU. Then the tokens are cut into parts. Each part is a block, which writes
// fp32 sums into the workspace. A second kernel adds them in the order of the parts, then finishes G. The model of
// tile_cost.h chooses the number of parts.
//
// The types and the sources of signs and masks are decided while G is finished. There memory takes the time, so one
// kernel serves them all.
#pragma once

#include <type_traits>

#include "eight_sm80.h"
#include "keep.h"
#include "score_factor.h"
#include "tile_sums_sm80.h"

namespace mft::cuda::sm80 {

struct ScoreGradArguments {
  View d_scores, d_weight, grad_output, x;
  View weight;  // no data: not a factor
  View sign_scores, keep_scores;
  const uint32_t *sign_words, *keep_words;
  const char* thresholds;
  int64_t threshold_bytes;  // from row to row
  bool accumulate, magnitude;
  int row_words, depth_tiles, tile_rows, tile_columns;
  int stages;  // 3 to kMostStages
  float* parts;    // (parts, weight.rows, part_stride); null: the tokens are one part
  int part_tiles;  // of the depth, per part
  int64_t part_stride;
};

MFT_DEVICE float threshold_of(const ScoreGradArguments& a, int row) {
  const char* const from = a.thresholds + row * a.threshold_bytes;
  if (a.keep_scores.type == Type::kFloat32) return load<float>(from);
  const auto bits = load<uint16_t>(from);
  return a.keep_scores.type == Type::kBFloat16 ? isa::widen(BFloat16{bits}) : isa::widen(Float16{bits});
}

// Finish 8 neighbours of G from `column`, a multiple of 8.
MFT_DEVICE void finish_eight(const ScoreGradArguments& a, const float (&g)[8], int row, int column) {
  const int64_t word = static_cast<int64_t>(row) * a.row_words + column / 32;
  if (a.d_scores.data != nullptr) {
    // All loads start before any loaded value is used.
    const bool weighted = a.weight.data != nullptr;
    const Eight weights = weighted ? Eight::of(a.weight, row, column) : Eight{};
    const bool by_scores = a.sign_scores.data != nullptr;
    const Eight scores = by_scores ? Eight::of(a.sign_scores, row, column) : Eight{};
    const uint32_t signs = a.sign_words != nullptr ? a.sign_words[word] >> (column % 32) : 0xff;
    const Eight before = a.accumulate ? Eight::of(a.d_scores, row, column) : Eight{};
    float weight[8], score[8], v[8];
    weights.widen(weight, a.weight.type);
    scores.widen(score, a.sign_scores.type);
    before.widen(v, a.d_scores.type);
    for (int i = 0; i < 8; ++i) {
      const float gradient =
          score_gradient(g[i], weighted ? weight[i] : 1.0f, by_scores ? sign_of(score[i]) : sign_of_bit(signs, i));
      v[i] = a.accumulate ? v[i] + gradient : gradient;
    }
    Eight::write(a.d_scores, row, column, v);
  }
  if (a.d_weight.data != nullptr) {
    uint32_t kept = 0;
    if (a.keep_words != nullptr) {
      kept = a.keep_words[word] >> (column % 32);
    } else {
      float score[8];
      Eight::of(a.keep_scores, row, column).widen(score, a.keep_scores.type);
      const float threshold = threshold_of(a, row);
      for (int i = 0; i < 8; ++i) {
        const bool keep = a.magnitude ? keeps<true>(score[i], threshold) : keeps<false>(score[i], threshold);
        kept |= static_cast<uint32_t>(keep) << i;
      }
    }
    float v[8];
    for (int i = 0; i < 8; ++i) v[i] = kept >> i & 1 ? g[i] : 0.0f;
    Eight::write(a.d_weight, row, column, v);
  }
}

// T: of grad_output, x, weight and d_weight. kChunked: grad_output and x are chunked.
template <class T, bool kChunked>
struct ScoreGradKernel {
  static constexpr int kThreads = sm80::kThreads;
  static constexpr int kBlocksPerMultiprocessor = kChunked ? 2 : 1;  // one: loads by elements need registers
  static constexpr bool kParts = kChunked;                           // the tokens may be cut
  using Arguments = ScoreGradArguments;

  static constexpr int kTile = 128, kTileDepth = 32;
  using Operand = Tile<kTileDepth, kTile, 2>;
  using Half = Tile<kTile / 2, kTile, 4>;  // of G: 32 rows of each warp
  static constexpr int kStageBytes = 2 * Operand::kBytes;
  static constexpr int kMostStages = kChunked ? 4 : 3;  // loads by elements are waited for, so more stages do not help
  static_assert(Half::kBytes <= 3 * kStageBytes);

  using Result = TileSums<T, kTile>;
  using Sums = typename Result::Sums;
  static constexpr int kWarpRows = Result::kWarpRows, kHalfRows = kWarpRows / 2;

  MFT_DEVICE static void run(const Arguments& a) {
    const TilePlace place = TilePlace::of(static_cast<int>(isa::block(0)), a.tile_rows, a.tile_columns);
    const int first_row = place.row * kTile, first_column = place.column * kTile;
    const int first_tile = kParts ? static_cast<int>(isa::block(1)) * a.part_tiles : 0;  // of the tokens
    const int left = a.depth_tiles - first_tile, tiles = kParts && a.part_tiles < left ? a.part_tiles : left;
    const int warp_row = Result::warp_row(), warp_column = Result::warp_column();
    char* const shared = isa::shared_memory();
    const int depth = first_tile * kTileDepth;
    const int length = a.x.rows - depth;  // to the end
    TileReader<Operand, true, kChunked, kThreads> grad(a.grad_output, depth, first_row, length);
    TileReader<Operand, true, kChunked, kThreads> x(a.x, depth, first_column, length);
    const auto copy = [&](int stage) {
      grad.copy(shared + stage * kStageBytes);
      x.copy(shared + stage * kStageBytes + Operand::kBytes);
      isa::commit_copies();
    };

    Sums sums = {};
    const auto sum = [&](auto number) {  // one loop per number of stages, as in product_sm80
      constexpr int kStages = decltype(number)::value;
      for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);
      for (int tile = 0, stage = 0, done = kStages - 1; tile < tiles; ++tile) {
        isa::wait_copies<kStages - 2>();
        isa::sync_block();  // all warps have the tile, and are done with the one before, which is overwritten
        if (!kParts || tile + kStages - 1 < tiles) {
          copy(done);
        } else {  // the next tile is the next part's
          isa::commit_copies();
        }
        const char* const grads = shared + stage * kStageBytes;
        Result::template multiply<Operand, true, Operand, true, kTileDepth>(
            sums, grads, grads + Operand::kBytes, warp_row, warp_column, [](auto&, int, int) {});
        done = stage;
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
    };
    if (kMostStages == 4 && a.stages == 4) {
      sum(std::integral_constant<int, 4>{});
    } else {
      sum(std::integral_constant<int, 3>{});
    }
    isa::wait_copies<0>();
    if constexpr (kParts) {
      if (a.parts != nullptr) {
        return Result::write_part(sums, a.parts, a.weight.rows, a.part_stride, first_row + warp_row,
                                  first_column + warp_column);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      isa::sync_block();  // all warps are done with the contents
      spread(sums, shared, half, warp_row / 2, warp_column);
      isa::sync_block();
      finish(a, shared, first_row + half * kHalfRows, first_column);
    }
  }

 private:
  MFT_DEVICE static void spread(const Sums& sums, char* shared, int half, int warp_row, int warp_column) {
#pragma unroll
    for (int i = 0; i < Result::kDown / 2; ++i) {
#pragma unroll
      for (int j = 0; j < Result::kAcross; ++j) {
        const float(&four)[4] = sums[half * Result::kDown / 2 + i][j];
        for (int down = 0; down < 2; ++down) {
          const int row = warp_row + 16 * i + 8 * down + isa::lane() / 4;
          const int column = warp_column + 8 * j + isa::lane() % 4 * 2;
          store(shared + Half::offset_of(row, column), Two{four[2 * down], four[2 * down + 1]});
        }
      }
    }
  }

  MFT_DEVICE static void finish(const Arguments& a, const char* shared, int first_row, int first_column) {
    for (int at = isa::thread(); at < Half::kRows * kTile / 8; at += kThreads) {
      const int of_half = at / (kTile / 8), column = at % (kTile / 8) * 8;
      const int row = of_half / kHalfRows * kWarpRows + of_half % kHalfRows;
      if (first_row + row >= a.weight.rows || first_column + column >= a.weight.columns) continue;
      float g[8];
      for (int i = 0; i < 2; ++i) {
        const auto words = load<isa::Words4>(shared + Half::offset(of_half, column / 4 + i));
        for (int j = 0; j < 4; ++j) g[4 * i + j] = isa::as_float(words.words[j]);
      }
      finish_eight(a, g, first_row + row, first_column + column);
    }
  }
};

// Adds the parts in the workspace from the first to the last, and finishes G. Each thread makes 8 neighbours.
struct FinishPartsKernel {
  static constexpr int kThreads = 128, kBlocksPerMultiprocessor = 1;
  struct Arguments {
    ScoreGradArguments of;
    int count;
  };

  MFT_DEVICE static void run(const Arguments& arguments) {
    const ScoreGradArguments& a = arguments.of;
    const int eights = (a.weight.columns + 7) / 8;
    const int64_t at = isa::block(0) * kThreads + isa::thread();
    const int row = static_cast<int>(at / eights), column = static_cast<int>(at % eights) * 8;
    if (row >= a.weight.rows) return;
    float g[8] = {};
    for (int part = 0; part < arguments.count; ++part) {
      add_eight(g, a.parts + (static_cast<int64_t>(part) * a.weight.rows + row) * a.part_stride + column);
    }
    finish_eight(a, g, row, column);
  }
};

}  // namespace mft::cuda::sm80
