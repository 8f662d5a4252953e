// The tiles of the sm_80 kernels: fragments hold the elements that mma.sync expects, and simultaneous reads access
// different banks. Shared memory is filled with its own indices, so that a fragment shows where it was read.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <set>
#include <vector>

#include "tile_sm80.h"

namespace mft::cuda::sm80 {
namespace {

using Fragment = uint32_t[4];

template <class Tile, bool kDepthDown, bool kA>
struct Reader {
  static constexpr int kThreads = 32, kBlocksPerMultiprocessor = 1;

  struct Arguments {
    Fragment* fragments;  // one per lane
    int outer, depth;
  };

  static void run(const Arguments& a) {
    char* const shared = isa::shared_memory();
    for (int i = isa::lane(); i < Tile::kBytes / 2; i += 32) store(shared + 2 * i, static_cast<uint16_t>(i));
    isa::sync_warp();
    if constexpr (kA) {
      load_a<Tile, kDepthDown>(a.fragments[isa::lane()], shared, a.outer, a.depth);
    } else {
      load_b<Tile, kDepthDown>(a.fragments[isa::lane()], shared, a.outer, a.depth);
    }
  }
};

void expect(bool holds, const char* what, int where) {
  if (holds) return;
  std::printf("%s, at %d\n", what, where);
  std::exit(1);
}

// For addresses that are read at once, `bytes` each: no two access the same bank, unless they access the same word.
void expect_no_conflict(const std::vector<int>& addresses, int bytes, const char* what) {
  std::set<int> words, banks;
  for (const int address : addresses) {
    for (int i = 0; i < bytes; i += 4) {
      if (words.insert((address + i) / 4).second) expect(banks.insert((address + i) / 4 % 32).second, what, address);
    }
  }
}

template <class Tile, bool kDepthDown, bool kA>
void check_fragments() {
  constexpr int kOuter = kDepthDown ? Tile::kColumns : Tile::kRows, kDepth = kDepthDown ? Tile::kRows : Tile::kColumns;
  for (int outer = 0; outer < kOuter; outer += 16) {
    for (int depth = 0; depth < kDepth; depth += 16) {
      Fragment fragments[32];
      using Kernel = Reader<Tile, kDepthDown, kA>;
      LaunchShape shape;
      shape.shared_bytes = Tile::kBytes;
      const std::string error = isa::launch<Kernel>(shape, nullptr, {fragments, outer, depth});
      expect(error.empty(), error.c_str(), outer);
      for (int i = 0; i < 4; ++i) {
        std::vector<int> rows;  // of ldmatrix
        for (int lane = 0; lane < 32; ++lane) {
          for (int half = 0; half < 2; ++half) {
            // A: (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8). B: (c, g), (c + 8, g), then the next 8 columns.
            const int along_outer = lane / 4 + (kA ? i % 2 : i / 2) * 8;
            const int along_depth = lane % 4 * 2 + half + (kA ? i / 2 : i % 2) * 8;
            const int row = kDepthDown ? depth + along_depth : outer + along_outer;
            const int column = kDepthDown ? outer + along_outer : depth + along_depth;
            const int index = fragments[lane][i] >> (16 * half) & 0xffff;
            expect(index == Tile::offset_of(row, column) / 2, "a fragment holds the wrong element", index);
            rows.push_back(index * 2 / kChunkBytes * kChunkBytes);
          }
        }
        expect_no_conflict(rows, kChunkBytes, "ldmatrix has bank conflicts");
      }
    }
  }
}

// Every element has a place of its own, and further() equals offset_of().
template <class Tile>
void check_places() {
  std::set<int> places;
  for (int row = 0; row < Tile::kRows; ++row) {
    for (int column = 0; column < Tile::kColumns; ++column) {
      const int offset = Tile::offset_of(row, column);
      expect(offset >= 0 && offset < Tile::kBytes && places.insert(offset).second, "two elements in a place", offset);
      const int rows = row / 8 * 8, columns = column / 8 * 8;
      expect(Tile::further(Tile::offset_of(row - rows, column - columns), rows, columns) == offset, "further", offset);
    }
  }
}

// Check what lanes [first, first + count) read or write at once, `bytes` each from address(g, c) on.
template <class Address>
void check_lanes(int count, int bytes, const char* what, Address address) {
  for (int first = 0; first < 32; first += count) {
    std::vector<int> addresses;
    for (int lane = first; lane < first + count; ++lane) addresses.push_back(address(lane / 4, lane % 4 * 2));
    expect_no_conflict(addresses, bytes, what);
  }
}

void check_direct_accesses() {
  using Scores = Tile<128, 32, 4>;
  using ScoresDown = Tile<32, 128, 4>;
  using Out = Tile<128, 128, 2>;
  using Sums = Tile<128, 128, 4>;
  for (int row = 0; row < 128; row += 8) {
    for (int column = 0; column < 128; column += 8) {
      check_lanes(32, 4, "writes of out conflict", [&](int g, int c) { return Out::offset_of(row + g, column + c); });
      check_lanes(16, 8, "writes of sums conflict", [&](int g, int c) { return Sums::offset_of(row + g, column + c); });
      if (column < 32) {
        check_lanes(16, 8, "fp32 scores conflict",
                    [&](int g, int c) { return Scores::offset_of(row + g, column + c); });
      }
      for (int odd = 0; odd < 2 && row < 32; ++odd) {
        check_lanes(32, 4, "fp32 scores of rows conflict",
                    [&](int g, int c) { return ScoresDown::offset_of(row + c + odd, column + g); });
      }
    }
  }
}

// The order has every tile of a matrix exactly once.
void check_order(int rows, int columns) {
  std::set<std::pair<int, int>> seen;
  for (int block = 0; block < rows * columns; ++block) {
    const TilePlace place = TilePlace::of(block, rows, columns);
    expect(place.row >= 0 && place.row < rows && place.column >= 0 && place.column < columns, "no such tile", block);
    expect(seen.insert({place.row, place.column}).second, "a tile twice", block);
  }
}

}  // namespace
}  // namespace mft::cuda::sm80

int main() {
  using namespace mft::cuda::sm80;
  using Flat128 = Tile<128, 32, 2>;
  using Flat64 = Tile<64, 32, 2>;
  using Down = Tile<32, 128, 2>;
  check_fragments<Flat128, false, true>();
  check_fragments<Flat64, false, true>();
  check_fragments<Flat128, false, false>();
  check_fragments<Down, true, true>();
  check_fragments<Down, true, false>();
  check_places<Flat128>();
  check_places<Flat64>();
  check_places<Down>();
  check_places<Tile<128, 32, 4>>();
  check_places<Tile<32, 128, 4>>();
  check_places<Tile<128, 128, 4>>();
  check_direct_accesses();
  for (const int rows : {1, 7, 8, 9, 25}) check_order(rows, 3);
  check_order(3, 20);
  std::puts("as it should be");
}
