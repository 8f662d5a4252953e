// The sums of a block's tile: which a warp has, the products of one step, and how the sums of a part are written.
//
// A block's 8 warps form a grid of 2 x 4: rows down (tokens of a product, features of a score gradient), columns across.
#pragma once

#include "tile_sm80.h"

namespace mft::cuda::sm80 {

// Two neighbours in fp32.
struct alignas(8) Two {
  float low, high;
};

template <class T, int kRows>
struct TileSums {
  static constexpr int kColumns = 128, kWarpsDown = 2, kWarpsAcross = kThreads / 32 / kWarpsDown;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = kColumns / kWarpsAcross;
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;  // mma.sync tiles in a warp's tile
  using Sums = float[kDown][kAcross][4];

  // The warp's first row and column in the tile.
  MFT_DEVICE static int warp_row() { return isa::warp() / kWarpsAcross * kWarpRows; }
  MFT_DEVICE static int warp_column() { return isa::warp() % kWarpsAcross * kWarpColumns; }

  // Multiply one step of kDepth. The rows of a tile are those of A, or columns of B, or (kADown, kBDown) depths. select
  // is applied to each fragment of B, with the column in the warp's tile and the depth where the fragment begins.
  template <class A, bool kADown, class B, bool kBDown, int kDepth, class Select>
  MFT_DEVICE static void multiply(Sums& sums, const char* a_tile, const char* b_tile, int warp_row, int warp_column,
                                  const Select& select) {
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t b[kAcross / 2][4];
#pragma unroll
      for (int j = 0; j < kAcross / 2; ++j) {
        load_b<B, kBDown>(b[j], b_tile, warp_column + 16 * j, depth);
        select(b[j], 16 * j, depth);
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {  // one fragment of A at a time: 128 registers leave no room for all
        uint32_t a[4];
        load_a<A, kADown>(a, a_tile, warp_row + 16 * i, depth);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          isa::multiply_16x8x16<T>(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Write the sums of part block(1) to parts (parts, rows, stride). row, column: the warp's first. Four lanes write a
  // sector.
  MFT_DEVICE static void write_part(const Sums& sums, float* parts, int rows, int64_t stride, int row, int column) {
    const int64_t first_row = isa::block(1) * rows;
    const int g = isa::lane() / 4, c = isa::lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kDown; ++i) {
      if (row + 8 * i + g >= rows) continue;
      float* const to = parts + (first_row + row + 8 * i + g) * stride + column + c;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const float(&four)[4] = sums[i / 2][j];
        store(reinterpret_cast<char*>(to + 8 * j), Two{four[i % 2 * 2], four[i % 2 * 2 + 1]});
      }
    }
  }
};

}  // namespace mft::cuda::sm80
