// The masks of a tile of the weight. They are applied to B of mma.sync, between ldmatrix and the product.
//
// A mask copies a tile of its own next to each tile of the weight, then selects from the fragments that load_b() gives.
// The weight's rows are columns of B, or (kTransposed) its depths. With g = lane / 4, c = 2 (lane % 4) and columns
// counted from the warp's first, register i of the 4 holds
//
//   weights (column + i / 2 * 8 + g, depth + i % 2 * 8 + c) and its right neighbour,
//   transposed: weights (depth + i % 2 * 8 + c, column + i / 2 * 8 + g) and its lower neighbour.
#pragma once

#include "keep.h"
#include "tile_sums_sm80.h"

namespace mft::cuda::sm80 {

constexpr int kWarpFeatures = 32;  // columns of B per warp
constexpr int kTileDepth = 32;

template <bool kTransposed, int kElement>
using WeightTile =
    Tile<kTransposed ? kTileDepth : kTileFeatures, kTransposed ? kTileFeatures : kTileDepth, kElement>;

struct Words {};  // in place of the scores' type

struct KeepArguments {
  View scores;  // if there are words: no data, but rows and columns
  const char* thresholds;
  int64_t threshold_bytes;  // from row to row
  const uint32_t* words;
  int row_words;
};

inline KeepArguments keep_arguments(const Keep& keep, const Matrix& weight) {
  Matrix scores = keep.scores;
  if (keep.words != nullptr) scores = {nullptr, Type::kBFloat16, weight.rows, weight.columns, weight.columns};
  return {view_of(scores), static_cast<const char*>(keep.thresholds), keep.threshold_stride * bytes_of(scores.type),
          keep.words, tiles_of(weight.columns, 32)};
}

template <class V>
MFT_DEVICE V threshold_of(const KeepArguments& keep, int row) {
  return row < keep.scores.rows ? load<V>(keep.thresholds + row * keep.threshold_bytes) : V{};
}

// Masks by 16-bit scores, which are loaded as fragments like the weights. If the weight's rows are columns of B, their
// thresholds are in registers. If they are depths, the thresholds follow the tile in shared memory, as the numbers that
// KeepPair adds (low[32], high[32]), and are loaded one tile ahead.
template <class S, bool kMagnitude, bool kTransposed, bool kChunked>
class Mask {
  using Scores = WeightTile<kTransposed, 2>;
  using Pair = KeepPair<S, kMagnitude>;

 public:
  static constexpr int kBytes = Scores::kBytes + (kTransposed ? 4 * kTileDepth : 0);

  // first: the block's first column of B. warp_column: the warp's first, counted from there. depth: the first of
  // `length`.
  MFT_DEVICE Mask(const KeepArguments& keep, int first, int warp_column, int depth, int length)
      : keep_(keep),
        warp_column_(warp_column),
        reader_(keep.scores, kTransposed ? depth : first, kTransposed ? first : depth, length),
        row_(depth) {
    if constexpr (kTransposed) {
      prefetch();
    } else {
      for (int i = 0; i < kPairs; ++i) {
        const int row = first + warp_column + 8 * i + isa::lane() / 4;
        pairs_[i] = Pair::of(threshold_of<uint16_t>(keep, row) * 0x10001u);
      }
    }
  }

  MFT_DEVICE void copy(char* tile) {
    reader_.copy(tile);
    if constexpr (kTransposed) {
      if (isa::thread() < kTileDepth) {
        const Pair pair = Pair::of(threshold_);
        char* const to = tile + Scores::kBytes + 2 * isa::thread();
        store(to, static_cast<uint16_t>(pair.low));
        if constexpr (!kMagnitude) store(to + 2 * kTileDepth, static_cast<uint16_t>(pair.high));
        prefetch();
      }
    }
  }

  MFT_DEVICE void select(uint32_t (&weights)[4], const char* tile, int column, int depth) const {
    uint32_t scores[4];
    load_b<Scores, kTransposed>(scores, tile, warp_column_ + column, depth);
    for (int i = 0; i < 4; ++i) {
      weights[i] = pair_of(tile, column + i / 2 * 8, depth + i % 2 * 8).select(weights[i], scores[i]);
    }
  }

 private:
  MFT_DEVICE Pair pair_of(const char* tile, int column, int depth) const {
    if constexpr (kTransposed) {
      const char* const from = tile + Scores::kBytes + 2 * (depth + 2 * (isa::lane() % 4));
      return {load<uint32_t>(from), kMagnitude ? 0 : load<uint32_t>(from + 2 * kTileDepth)};
    } else {
      return pairs_[column / 8];
    }
  }

  MFT_DEVICE void prefetch() {
    if (isa::thread() < kTileDepth) threshold_ = threshold_of<uint16_t>(keep_, row_ + isa::thread());
    row_ += kTileDepth;
  }

  const KeepArguments& keep_;
  int warp_column_;
  TileReader<Scores, kTransposed, kChunked, kThreads> reader_;
  static constexpr int kPairs = kTransposed ? 1 : 4;
  Pair pairs_[kPairs];
  uint32_t threshold_ = 0;  // of the thread's row in the next tile
  int row_;                 // the first row of the tile after that
};

// Masks by fp32 scores, which are read one or two at a time from a tile of twice the size.
template <bool kMagnitude, bool kTransposed, bool kChunked>
class Mask<float, kMagnitude, kTransposed, kChunked> {
  using Scores = WeightTile<kTransposed, 4>;

 public:
  static constexpr int kBytes = Scores::kBytes + (kTransposed ? 4 * kTileDepth : 0);

  MFT_DEVICE Mask(const KeepArguments& keep, int first, int warp_column, int depth, int length)
      : keep_(keep),
        warp_column_(warp_column),
        reader_(keep.scores, kTransposed ? depth : first, kTransposed ? first : depth, length),
        row_(depth) {
    if constexpr (kTransposed) {
      prefetch();
    } else {
      for (int i = 0; i < 4; ++i) {
        thresholds_[i] = threshold_of<float>(keep, first + warp_column + 8 * i + isa::lane() / 4);
      }
    }
  }

  MFT_DEVICE void copy(char* tile) {
    reader_.copy(tile);
    if constexpr (kTransposed) {
      if (isa::thread() < kTileDepth) {
        store(tile + Scores::kBytes + 4 * isa::thread(), thresholds_[0]);
        prefetch();
      }
    }
  }

  MFT_DEVICE void select(uint32_t (&weights)[4], const char* tile, int column, int depth) const {
    const int g = isa::lane() / 4, c = isa::lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int column_in_warp = column + i / 2 * 8, first_column = warp_column_ + column_in_warp;
      const int first_depth = depth + i % 2 * 8;
      Two scores, thresholds;
      if constexpr (kTransposed) {
        scores = {load<float>(tile + Scores::further(Scores::offset_of(c, g), first_depth, first_column)),
                  load<float>(tile + Scores::further(Scores::offset_of(c + 1, g), first_depth, first_column))};
        thresholds = load<Two>(tile + Scores::kBytes + 4 * (first_depth + c));
      } else {
        scores = load<Two>(tile + Scores::further(Scores::offset_of(g, c), first_column, first_depth));
        thresholds.low = thresholds.high = thresholds_[column_in_warp / 8];
      }
      if (!keeps<kMagnitude>(scores.low, thresholds.low)) weights[i] &= 0xffff0000u;
      if (!keeps<kMagnitude>(scores.high, thresholds.high)) weights[i] &= 0x0000ffffu;
    }
  }

 private:
  MFT_DEVICE void prefetch() {
    if (isa::thread() < kTileDepth) thresholds_[0] = threshold_of<float>(keep_, row_ + isa::thread());
    row_ += kTileDepth;
  }

  const KeepArguments& keep_;
  int warp_column_;
  TileReader<Scores, kTransposed, kChunked, kThreads> reader_;
  float thresholds_[kTransposed ? 1 : 4] = {};  // of the warp's columns, or of the thread's row in the next tile
  int row_;                                     // the first row of the tile after that
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
