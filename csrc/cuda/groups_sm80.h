// Which rows belong to which expert: for a product, the rows of one tile; for d_scores, all rows of one expert.
//
// offsets[e] is where the rows of expert e end and those of the next begin. As in the reference, an offset that is less
// than an earlier one counts as the largest offset before it, and one above the number of rows counts as that number.
// So whatever the offsets hold, each row belongs to exactly one expert or to nobody, and no other row is touched. The
// offsets are read on the device; nothing waits for them.
#pragma once

#include "keys.h"
#include "tile_sm80.h"

namespace mft::cuda::sm80 {

struct Groups {
  const int32_t* offsets;
  int experts, rows;

  // Return where the rows of an expert end. Behind the last expert come the rows of nobody, which end with all rows.
  MFT_DEVICE int offset(int expert) const {
    const int end = expert < experts ? offsets[expert] : rows;
    return end < rows ? end : rows;
  }
};

// Return the largest value of this lane and those before it.
MFT_DEVICE int largest_so_far(int value, int lane) {
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int other = isa::shuffle(value, (lane + 32 - by) % 32);
    if (lane >= by && other > value) value = other;
  }
  return value;
}

// Return the largest possible number of tiles: each expert's last tile may have a single row, and so may that of
// nobody.
inline int64_t most_tiles(int64_t rows, int64_t experts, int tokens) {
  return std::min(rows, (rows + tokens - 1) / tokens + experts);
}

struct alignas(16) GroupTile {
  int expert;       // the number of experts: rows of nobody
  int first, rows;  // up to kTokens rows; 0: there is no such tile
  int padding;

  // Called by a whole warp. Each lane looks at kEach neighbouring experts at a time.
  template <int kTokens>
  MFT_DEVICE static GroupTile of(const Groups& groups, int tile) {
    constexpr int kEach = 4;
    const int lane = isa::lane();
    int begin = 0;  // of the rows of the expert that a round begins with
    for (int base = 0; base <= groups.experts; base += 32 * kEach) {
      const int expert = base + lane * kEach;
      int ends[kEach];
      for (int i = 0; i < kEach; ++i) {
        const int end = groups.offset(expert + i), before = i == 0 ? begin : ends[i - 1];
        ends[i] = end > before ? end : before;
      }
      const int largest = largest_so_far(ends[kEach - 1], lane);
      const int others = isa::shuffle(largest, (lane + 31) % 32);
      int from = lane == 0 ? begin : others, tiles = 0;
      for (int i = 0; i < kEach; ++i) {
        if (ends[i] < from) ends[i] = from;
        tiles += (ends[i] - (i == 0 ? from : ends[i - 1]) + kTokens - 1) / kTokens;
      }
      const int upto = static_cast<int>(scan(tiles, lane));
      int left = tile - (upto - tiles);
      GroupTile found = {};
      for (int i = 0; i < kEach; ++i) {
        const int rows = ends[i] - from, own = (rows + kTokens - 1) / kTokens;
        if (left >= 0 && left < own) {
          const int behind = rows - left * kTokens;
          found = {expert + i, from + left * kTokens, behind < kTokens ? behind : kTokens, 0};
        }
        left -= own;
        from = ends[i];
      }
      // At most one lane has found it.
      found.rows = static_cast<int>(isa::largest_of_warp(found.rows));
      if (found.rows > 0) {
        return {static_cast<int>(isa::largest_of_warp(found.expert)),
                static_cast<int>(isa::largest_of_warp(found.first)), found.rows, 0};
      }
      tile -= isa::shuffle(upto, 31);
      begin = isa::shuffle(largest, 31);
    }
    return {};
  }
};

// All rows of an expert, looked up by a whole warp.
struct GroupRows {
  int first, rows;

  MFT_DEVICE static GroupRows of(const Groups& groups, int expert) {
    int largest = 0;
    for (int i = isa::lane(); i < expert; i += 32) {
      const int end = groups.offset(i);
      if (end > largest) largest = end;
    }
    const int first = static_cast<int>(isa::largest_of_warp(largest)), end = groups.offset(expert);
    return {first, end > first ? end - first : 0};
  }
};

}  // namespace mft::cuda::sm80
