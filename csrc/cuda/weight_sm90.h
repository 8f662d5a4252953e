// The masked weight of product_sm90.cuh: 16-bit weights, masked by packed words or by scores. It says how one step, 128
// features x 64 of Q, is loaded into a stage of shared memory, and how the lanes of a consumer read it as wgmma's first
// operand.
#pragma once

#include "isa_sm90.h"
#include "keep.h"
#include "tile_sm90.h"

namespace mft::cuda {

enum class MaskKind { kWords, kMagnitude, kValue };  // packed; or from scores of the weight's type

namespace sm90 {

constexpr int kConsumers = 2;               // warpgroups of a block
constexpr int kFeatures = 64 * kConsumers;  // of a block
constexpr int kStep = 64;                   // of Q: a swizzled row of 128 bytes
constexpr int kWordsOfTile = 4;             // 16 bytes, the minimum of TMA: 128 columns

struct WeightArguments {
  isa::TensorMap weight, mask;
  const uint16_t* thresholds;
  int64_t threshold_stride;
};

// T: of the weight and the scores. kIsTransposed: for d_x.
template <class T, MaskKind kMask, bool kIsTransposed>
struct MaskedWeight {
  using Number = T;
  static constexpr bool kTransposed = kIsTransposed, kByWords = kMask == MaskKind::kWords;
  static constexpr int kWeightBytes = kFeatures * kStep * 2;
  static constexpr int kRows = kTransposed ? kStep : kFeatures;  // of the weight, in a tile
  static constexpr int kMaskBytes = kByWords ? kRows * kWordsOfTile * 4 : kWeightBytes;
  static constexpr int kStageBytes = kWeightBytes + kMaskBytes;
  static_assert(kStageBytes % 1024 == 0);

  // What a lane keeps. Its place in the fragment layout (isa.h) is row g = lane / 4, column c = 2 (lane % 4), in one of
  // four warps of one of two warpgroups.
  struct Lane {
    int group, warp, g, c;
    int rows[kStep / 16];  // offset in a stage of the row that this lane gives to ldmatrix
    KeepPair<T, kMask == MaskKind::kMagnitude> keep[2];  // of features g and g + 8 of this warp

    MFT_DEVICE explicit Lane(int group)
        : group(group), warp(isa::warp() % 4), g(isa::lane() / 4), c(isa::lane() % 4 * 2) {
#pragma unroll
      for (int i = 0; i < kStep / 16; ++i) rows[i] = matrix_row(*this, i);
    }
  };

  // Prefetch the tensor maps, once per block; one thread.
  MFT_DEVICE static void prefetch(const WeightArguments& a) {
    isa::prefetch(a.weight);
    isa::prefetch(a.mask);
  }

  // Load a step by TMA; one thread. Words are loaded in whole chunks of 16 bytes, TMA's least.
  MFT_DEVICE static void bring(const WeightArguments& a, isa::TransactionBarrier* b, char* stage, int feature, int q) {
    bring_tile(a.weight, b, stage, feature, q);
    if constexpr (kByWords) {
      const int column = kTransposed ? feature : q, row = kTransposed ? q : feature;
      isa::load_tile(a.mask, b, stage + kWeightBytes, column / 128 * kWordsOfTile, row);
    } else {
      bring_tile(a.mask, b, stage + kWeightBytes, feature, q);
    }
  }

  // Read the thresholds of the lane's features; called for each tile.
  MFT_DEVICE static void begin_tile(Lane& lane, const WeightArguments& a, int features, int feature) {
    if constexpr (!kByWords) {
      for (int i = 0; i < 2; ++i) {
        // Transposed, thresholds by row would vary along Q, so there is one for the matrix.
        int row = feature + 16 * lane.warp + lane.g + 8 * i;
        row = kTransposed ? 0 : row < features ? row : features - 1;
        const uint32_t threshold = a.thresholds[row * a.threshold_stride];
        lane.keep[i] = KeepPair<T, kMask == MaskKind::kMagnitude>::of(threshold | threshold << 16);
      }
    }
  }

  // Read the masked weight of a step, 16 of Q per four registers.
  MFT_DEVICE static void read(isa::Register (&r)[kStep / 16][4], const char* stage, const Lane& lane, int step) {
    const char* mask = stage + kWeightBytes;
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      load_rows(r[i], stage + lane.rows[i]);
      if constexpr (kByWords) {
        select_by_words(r[i], reinterpret_cast<const uint32_t*>(mask), lane, i, step);
      } else {
        isa::Register scores[4];
        load_rows(scores, mask + lane.rows[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) r[i][j] = lane.keep[j % 2].select(r[i][j], scores[j]);
      }
    }
  }

 private:
  // Drop from the 16 x 16 block i of a step what the words do not keep. words: for each row of the weight, the four
  // words that hold the step's columns.
  MFT_DEVICE static void select_by_words(isa::Register (&weights)[4], const uint32_t* words, const Lane& lane, int i,
                                         int step) {
    if constexpr (kTransposed) {
      // Rows c and c + 1 (and + 8) of the weight in this block of 16; in each row, the half word with this warp's 16
      // columns.
      const auto* half = reinterpret_cast<const uint16_t*>(words) + (16 * i + lane.c) * 2 * kWordsOfTile +
                         4 * lane.group + lane.warp;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // j % 2: columns + 8, j / 2: rows + 8
        const isa::Register low = isa::load_shared(half + j / 2 * 8 * 2 * kWordsOfTile);
        const isa::Register high = isa::load_shared(half + (j / 2 * 8 + 1) * 2 * kWordsOfTile);
        const int column = lane.g + j % 2 * 8;
        weights[j] &= isa::spread_signs(low << (15 - column), high << (31 - column));
      }
    } else {
      // Rows g and g + 8; the word with columns 16 i to 16 i + 15 of this step.
      const uint32_t* word = words + (64 * lane.group + 16 * lane.warp + lane.g) * kWordsOfTile + step % 2 * 2 + i / 2;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // j % 2: rows + 8, j / 2: columns + 8
        const isa::Register bits = isa::load_shared(word + j % 2 * 8 * kWordsOfTile) >> lane.c;
        const int column = i % 2 * 16 + j / 2 * 8;  // its bit, and the next one
        const isa::Register low = column < 16 ? bits << (15 - column) : bits >> (column - 15);
        weights[j] &= isa::spread_signs(low, bits << (30 - column));
      }
    }
  }

  // Load 128 features x 64 of Q; transposed, one tile per consumer.
  MFT_DEVICE static void bring_tile(const isa::TensorMap& map, isa::TransactionBarrier* b, char* shared, int feature,
                                    int q) {
    if constexpr (kTransposed) {
      for (int i = 0; i < kConsumers; ++i) {
        isa::load_tile(map, b, shared + i * kStep * kRowBytes, feature + 64 * i, q);
      }
    } else {
      isa::load_tile(map, b, shared, q, feature);
    }
  }

  // Return the offset of the row of 16 bytes that this lane gives to ldmatrix, for the 16 x 16 block i of a step.
  MFT_DEVICE static int matrix_row(const Lane& lane, int i) {
    const int matrix = isa::lane() / 8, row = isa::lane() % 8;
    if constexpr (kTransposed) {  // tile (64 of Q, 64 features): matrices go through the features first
      return lane.group * kStep * kRowBytes + swizzled(16 * i + matrix / 2 * 8 + row, 2 * lane.warp + matrix % 2);
    } else {  // tile (128 features, 64 of Q)
      return swizzled(64 * lane.group + 16 * lane.warp + matrix % 2 * 8 + row, 2 * i + matrix / 2);
    }
  }

  MFT_DEVICE static void load_rows(isa::Register (&r)[4], const char* row) {
    if constexpr (kTransposed) {
      isa::load_matrices_transposed(r, row);
    } else {
      isa::load_matrices(r, row);
    }
  }
};

}  // namespace sm90
}  // namespace mft::cuda
