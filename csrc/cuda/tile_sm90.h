// Layouts: tiles in shared memory as TMA swizzles them, and the order in which clusters take tiles of the output. Plain
// arithmetic, which the tests execute as well.
#pragma once

#include "isa.h"

namespace mft::cuda {

constexpr int kRowBytes = 128;  // of a swizzled tile: 64 16-bit elements

// Return the byte offset of the 16-byte chunk `chunk` (0 to 7) of row `row` in a tile of 128-byte rows: TMA's 128-byte
// swizzle. In eight consecutive rows, a chunk number lies in eight different bank groups, so ldmatrix and stmatrix have
// no bank conflicts.
MFT_DEVICE int swizzled(int row, int chunk) { return row * kRowBytes + (chunk ^ (row & 7)) * 16; }

struct Tile {
  int feature, token;  // in tiles
};

// Return the tile of an index. Tiles are taken in panels of kPanel token tiles, through all features before the next
// panel. So clusters that run together share tokens and features, and both come from L2. Every index in [0, features *
// tokens) gives one tile.
MFT_DEVICE Tile tile_at(int index, int feature_tiles, int token_tiles) {
  constexpr int kPanel = 8;  // 66 clusters (132 multiprocessors) take 8 x 8 tiles at a time
  const int panel = index / (kPanel * feature_tiles);
  const int within = index - panel * kPanel * feature_tiles;
  const int left = token_tiles - panel * kPanel, height = left < kPanel ? left : kPanel;
  return {within / height, panel * kPanel + within % height};
}

}  // namespace mft::cuda
