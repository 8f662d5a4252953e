// The masks of a tile of the weight. They are applied to B of mma.sync, between ldmatrix and the product.
//
// A mask copies a tile of its own next to each tile of the weight, then selects from the fragments that load_b() gives.
// The weight's rows are columns of B, or (kTransposed) its depths. With g = lane / 4, c = 2 (lane % 4) and columns
// counted from the warp's first, register i of the 4 holds
//
//   weights (column + i / 2 * 8 + g, depth + i % 2 * 8 + c) and its right neighbour,
//   transposed: weights (depth + i % 2 * 8 + c, column + i / 2 * 8 + g) and its lower neighbour.
#pragma once

#include <type_traits>

#include "keep.h"
#include "tile_sm80.h"

namespace mft::cuda::sm80 {

constexpr int kWarpFeatures = 32;  // columns of B per warp
constexpr int kTileDepth = 32;

template <bool kTransposed, int kElement>
using WeightTile =
    Tile<kTransposed ? kTileDepth : kTileFeatures, kTransposed ? kTileFeatures : kTileDepth, kElement>;

struct Words {};  // in place of the scores' type

struct KeepArguments {
  View scores;  // if there are words: no data, but rows and columns
  const char* threshold;
  const uint32_t* words;
  int row_words;
};

inline KeepArguments keep_arguments(const Keep& keep, const Matrix& weight) {
  Matrix scores = keep.scores;
  if (keep.words != nullptr) scores = {nullptr, Type::kBFloat16, weight.rows, weight.columns, weight.columns};
  return {view_of(scores), static_cast<const char*>(keep.threshold), keep.words, tiles_of(weight.columns, 32)};
}

// Masks by scores. 16-bit scores are loaded as fragments like the weights. fp32 scores are read one or two at a time,
// from a tile of twice the size.
template <class S, bool kMagnitude, bool kTransposed, bool kChunked>
class Mask {
  static constexpr bool kWide = std::is_same_v<S, float>;
  using Scores = WeightTile<kTransposed, sizeof(S)>;
  using Threshold = std::conditional_t<kWide, float, KeepPair<S, kMagnitude>>;

 public:
  static constexpr int kBytes = Scores::kBytes;

  // first: the block's first column of B. warp_column: the warp's first, counted from there. depth: the first of
  // `length`.
  MFT_DEVICE Mask(const KeepArguments& keep, int first, int warp_column, int depth, int length)
      : warp_column_(warp_column),
        reader_(keep.scores, kTransposed ? depth : first, kTransposed ? first : depth, length),
        threshold_(read(keep.threshold)) {}

  MFT_DEVICE void copy(char* tile) { reader_.copy(tile); }

  MFT_DEVICE void select(uint32_t (&weights)[4], const char* tile, int column, int depth) const {
    if constexpr (kWide) {
      const int g = isa::lane() / 4, c = isa::lane() % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        const int first_column = warp_column_ + column + i / 2 * 8, first_depth = depth + i % 2 * 8;
        Two scores;
        if constexpr (kTransposed) {
          scores = {load<float>(tile + Scores::further(Scores::offset_of(c, g), first_depth, first_column)),
                    load<float>(tile + Scores::further(Scores::offset_of(c + 1, g), first_depth, first_column))};
        } else {
          scores = load<Two>(tile + Scores::further(Scores::offset_of(g, c), first_column, first_depth));
        }
        if (!keeps<kMagnitude>(scores.low, threshold_)) weights[i] &= 0xffff0000u;
        if (!keeps<kMagnitude>(scores.high, threshold_)) weights[i] &= 0x0000ffffu;
      }
    } else {
      uint32_t scores[4];
      load_b<Scores, kTransposed>(scores, tile, warp_column_ + column, depth);
      for (int i = 0; i < 4; ++i) weights[i] = threshold_.select(weights[i], scores[i]);
    }
  }

 private:
  struct alignas(8) Two {
    float low, high;
  };

  MFT_DEVICE static Threshold read(const char* threshold) {
    if constexpr (kWide) return load<float>(threshold);
    else return Threshold::of(load<uint16_t>(threshold));
  }

  int warp_column_;
  TileReader<Scores, kTransposed, kChunked, kThreads> reader_;
  Threshold threshold_;
};

// Masks by packed words, 128 per tile. They are aligned to only 4 bytes, so each is copied by itself. A lane shifts its
// two bits of all four groups of 8 columns to the tops of bytes at once.
template <bool kMagnitude, bool kTransposed, bool kChunked>
class Mask<Words, kMagnitude, kTransposed, kChunked> {
 public:
  static constexpr int kBytes = 4 * kTileFeatures;

  MFT_DEVICE Mask(const KeepArguments& keep, int first, int warp_column, int depth, int length)
      : keep_(keep), warp_column_(warp_column) {
    constexpr int kWords = kTransposed ? kTileFeatures / 32 : 1;  // per row of the tile
    const int row = isa::thread() / kWords + (kTransposed ? depth : first);
    const int word = isa::thread() % kWords + (kTransposed ? first : depth) / 32;
    rows_ = kTransposed ? length - isa::thread() / kWords : keep.scores.rows - row;
    words_ = kTransposed ? keep.row_words - word : tiles_of(length, 32);
    source_ = keep.words + static_cast<int64_t>(row) * keep.row_words + word;
  }

  MFT_DEVICE void copy(char* tile) {
    if (isa::thread() < kTileFeatures) {
      isa::copy_async<4>(tile + 4 * isa::thread(), source_, rows_ > 0 && words_ > 0);
    }
    if constexpr (kTransposed) {
      source_ += static_cast<int64_t>(keep_.row_words) * kTileDepth;
      rows_ -= kTileDepth;
    } else {
      ++source_;
      --words_;
    }
  }

  MFT_DEVICE void select(uint32_t (&weights)[4], const char* tile, int column, int depth) const {
    const int g = isa::lane() / 4, c = isa::lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      if constexpr (kTransposed) {
        const char* const word = tile + 4 * ((depth + i % 2 * 8 + c) * (kTileFeatures / 32) + warp_column_ / 32);
        const uint32_t low = load<uint32_t>(word) << (7 - g);
        const uint32_t high = load<uint32_t>(word + kTileFeatures / 8) << (7 - g);
        weights[i] &= tops(low, high, column / 8 + i / 2);
      } else {
        const uint32_t word = load<uint32_t>(tile + 4 * (warp_column_ + column + i / 2 * 8 + g));
        weights[i] &= tops(word << (7 - c), word << (6 - c), depth / 8 + i % 2);
      }
    }
  }

 private:
  // Return 0xffff or 0 in each half, by the top bits of byte `byte` of low and high.
  MFT_DEVICE static uint32_t tops(uint32_t low, uint32_t high, int byte) {
    const uint32_t pair = (low >> (8 * byte) & 0xff) << 8 | (high >> (8 * byte)) << 24;
    return isa::spread_signs(pair);
  }

  const KeepArguments& keep_;
  int warp_column_;
  const uint32_t* source_;  // the thread's word of the next tile
  int rows_, words_;        // how many are left from there on, if any
};

}  // namespace mft::cuda::sm80
