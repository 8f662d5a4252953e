// The product over experts: out[i] = in[i] @ where(keep[e], weight[e], 0).T + bias[e] for the rows i of expert e, or
// with the weights transposed. One launch serves all experts.
//
//             depth            blocks: tiles of 64 or 128 rows of one expert (the last of each may have fewer), times
//        +---------------+     tiles of 128 features. A block looks up in the offsets which expert's rows its tile has,
//      0 | in            |     moves the pointers there, and does what product_sm80.cuh does.
//        |- - - - - - - -|
//      2 |               |     The host does not know which experts have rows. It launches as many blocks as there
//        |- - - - - - - -|     could be tiles, and those behind the last tile return at once. Rows behind the last
// nobody |               |     offset belong to nobody; their tiles write zeros.
//        +---------------+
//
// A block waits for the offsets once; then its first warp needs 16 shuffles and reductions per 128 offsets.
#pragma once

#include <type_traits>

#include "groups_sm80.h"
#include "product_sm80.cuh"

namespace mft::cuda::sm80 {

struct GroupedProductArguments {
  ProductArguments of;  // in and out: of all rows; weight, scores, words, threshold and bias: the first expert's
  Groups groups;
  int64_t weight_bytes, score_bytes, threshold_bytes, words, bias_bytes;  // from one expert to the next

  // Return the arguments of one tile.
  MFT_DEVICE ProductArguments arguments(const GroupTile& tile) const {
    ProductArguments a = of;
    const int64_t expert = tile.expert;
    a.in.data += tile.first * a.in.row_bytes;
    a.out.data += tile.first * a.out.row_bytes;
    a.in.rows = a.out.rows = tile.rows;
    a.weight.data += expert * weight_bytes;
    a.keep.scores.data += expert * score_bytes;
    a.keep.thresholds += expert * threshold_bytes;
    a.keep.words += expert * words;
    a.bias = a.bias == nullptr || tile.expert == groups.experts ? nullptr : a.bias + expert * bias_bytes;
    a.parts = nullptr;
    return a;
  }
};

// ProductKernel over experts. It does not read scores in the other 16-bit type, or scores if rows are not whole chunks:
// such scores are packed first, because each kernel takes 50 KB of the library.
template <class T, class S, bool kMagnitude, bool kTransposed, bool kChunked, int kTokensT>
struct GroupedProductKernel {
  using OneProduct = ProductKernel<T, S, kMagnitude, kTransposed, kChunked, kTokensT, false>;
  using Result = typename OneProduct::Result;
  using Arguments = GroupedProductArguments;
  static constexpr int kTokens = kTokensT, kThreads = OneProduct::kThreads;
  static constexpr int kBlocksPerMultiprocessor = OneProduct::kBlocksPerMultiprocessor;
  static constexpr int kStageBytes = OneProduct::kStageBytes;
  static constexpr int kTileBytes = 128;  // before the stages: the block's GroupTile

  MFT_DEVICE static void run(const Arguments& g) {
    char *const found = isa::shared_memory(), *const shared = found + kTileBytes;
    if (isa::warp() == 0) {
      const GroupTile tile = GroupTile::of<kTokens>(g.groups, place_of(g).row);
      if (isa::lane() == 0) store(found, tile);
    }
    isa::sync_block();
    typename Result::Sums sums = {};
    {
      const auto tile = load<GroupTile>(found);
      if (tile.rows == 0) return;
      if (tile.expert < g.groups.experts) {
        OneProduct::add_up(g.arguments(tile), Result::place_at(0, place_of(g).column), shared, sums);
      }
    }
    isa::sync_block();
    // Loaded again, because registers are short in the loop.
    Result::write(g.arguments(load<GroupTile>(found)), sums, shared, Result::place_at(0, place_of(g).column));
  }

 private:
  MFT_DEVICE static TilePlace place_of(const Arguments& g) {
    return TilePlace::of(isa::shuffle(static_cast<int>(isa::block(0)), 0), g.of.tile_rows, g.of.tile_columns);
  }
};

inline bool is_chunked(const GroupedProduct& g) {
  const auto apart = [&](const Matrix& m, int64_t stride) {
    return m.data == nullptr || g.experts == 1 || stride * bytes_of(m.type) % kChunkBytes == 0;
  };
  return is_chunked(g.of) && apart(g.of.weight, g.weight_stride) && apart(g.of.keep.scores, g.score_stride);
}

template <class Kernel>
std::string launch_grouped(const GroupedProduct& g, const Device& device) {
  const Product& p = g.of;
  GroupedProductArguments a = {};
  a.of = product_arguments(p, Plan{});
  a.groups = {g.offsets, static_cast<int>(g.experts), static_cast<int>(p.out.rows)};
  a.weight_bytes = g.weight_stride * bytes_of(p.weight.type);
  if (p.keep.words != nullptr) {
    a.words = p.weight.rows * a.of.keep.row_words;
  } else {
    a.score_bytes = g.score_stride * bytes_of(p.keep.scores.type);
    a.threshold_bytes = bytes_of(p.keep.scores.type);
  }
  a.bias_bytes = p.out.columns * bytes_of(p.out.type);
  const int64_t tiles = most_tiles(p.out.rows, g.experts, Kernel::kTokens);
  LaunchShape shape;
  shape.x = tiles * a.of.tile_columns;
  if (shape.x > kLongestSide) return "x has too many tokens, 2^31 tiles and more; split them";
  a.of.tile_rows = static_cast<int>(tiles);
  a.of.stages = stages_of(Kernel::kStageBytes, device, Kernel::kTileBytes);
  shape.shared_bytes = a.of.stages * Kernel::kStageBytes + Kernel::kTileBytes;
  return isa::launch<Kernel>(shape, device.stream, a);
}

template <class T, class S, bool kMagnitude, bool kTransposed>
std::string grouped_by(const GroupedProduct& g, int tokens, const Device& device) {
  if constexpr (std::is_same_v<S, Words>) {
    if (!is_chunked(g)) return launch_grouped<GroupedProductKernel<T, S, kMagnitude, kTransposed, false, 128>>(g, device);
  }
  return tokens == 64 ? launch_grouped<GroupedProductKernel<T, S, kMagnitude, kTransposed, true, 64>>(g, device)
                      : launch_grouped<GroupedProductKernel<T, S, kMagnitude, kTransposed, true, 128>>(g, device);
}

template <class T, bool kTransposed>
std::string grouped_by(const GroupedProduct& g, int tokens, const Device& device) {
  const Keep& keep = g.of.keep;
  if (keep.words != nullptr) return grouped_by<T, Words, true, kTransposed>(g, tokens, device);
  if (keep.scores.type == Type::kFloat32) {
    return keep.magnitude ? grouped_by<T, float, true, kTransposed>(g, tokens, device)
                          : grouped_by<T, float, false, kTransposed>(g, tokens, device);
  }
  return keep.magnitude ? grouped_by<T, T, true, kTransposed>(g, tokens, device)
                        : grouped_by<T, T, false, kTransposed>(g, tokens, device);
}

template <class T>
std::string grouped_of(const GroupedProduct& g, int tokens, const Device& device) {
  return g.of.transposed ? grouped_by<T, true>(g, tokens, device) : grouped_by<T, false>(g, tokens, device);
}

// Each is instantiated in a file of its own.
extern template std::string grouped_of<BFloat16>(const GroupedProduct&, int, const Device&);
extern template std::string grouped_of<Float16>(const GroupedProduct&, int, const Device&);

}  // namespace mft::cuda::sm80
