// Tiles in shared memory: where an element lies, how it is copied there, and how fragments of mma.sync are read.
//
// A tile is read in chunks of 16 bytes. Its rows are swizzled: chunk c of row r lies at c ^ swizzle(r). So what a
// kernel reads at once lies in different banks: a chunk of 8 rows (ldmatrix), or a fragment's fp32 scores.
#pragma once

#include <algorithm>

#include "api.h"
#include "isa.h"

namespace mft::cuda::sm80 {

constexpr int kChunkBytes = 16;
constexpr int kTileFeatures = 128;  // of a product's tile: columns of B per block
constexpr int kThreads = 256;       // of a block that computes such a tile

// The most rows and columns of a matrix (2^31 less some tiles): indices are ints, offsets are int64_t.
constexpr int64_t kLongestSide = 0x7fff0000;

template <class V>
MFT_DEVICE V load(const char* p) {
  isa::note_read(p);
  V v;
  __builtin_memcpy(&v, __builtin_assume_aligned(p, sizeof(V)), sizeof(V));
  return v;
}

template <class V>
MFT_DEVICE void store(char* p, V v) {
  __builtin_memcpy(__builtin_assume_aligned(p, sizeof(V)), &v, sizeof(V));
}

template <int kRowsT, int kColumnsT, int kElementT>
struct Tile {
  static constexpr int kRows = kRowsT, kColumns = kColumnsT, kElement = kElementT;  // kElement: bytes
  static constexpr int kPerChunk = kChunkBytes / kElement, kChunks = kColumns / kPerChunk;
  static constexpr int kRowBytes = kColumns * kElement, kBytes = kRows * kRowBytes;

  MFT_DEVICE static int swizzle(int row) {
    if constexpr (kElement == 4) return (row % 4 ^ row / 4 % 2) * 2;  // even: pairs of chunks stay together
    return kChunks == 4 ? row / 2 % 4 : row % 8;                  // two rows of 64 bytes share the 128 of all banks
  }

  // Return offsets in bytes.
  MFT_DEVICE static int offset(int row, int chunk) { return row * kRowBytes + (chunk ^ swizzle(row)) * kChunkBytes; }
  MFT_DEVICE static int offset_of(int row, int column) {
    return offset(row, column / kPerChunk) + column % kPerChunk * kElement;
  }

  // Return the offset `rows` and `columns` further on. `rows` is a multiple of 8. `columns` is a multiple of whole
  // chunks and shares no chunk bit, in binary, with the column it is added to. One operation, compared with four in
  // offset().
  MFT_DEVICE static int further(int offset, int rows, int columns) {
    return (offset ^ columns * kElement) + rows * kRowBytes;
  }
};

// A matrix as kernels read and write it.
struct View {
  char* data;
  int64_t row_bytes;
  int rows, columns;
  Type type;
  bool chunked;  // its rows are whole, aligned chunks

  MFT_DEVICE char* at(int row, int column) const {
    return data + row * row_bytes + static_cast<int64_t>(column) * (type == Type::kFloat32 ? 4 : 2);
  }
};

inline View view_of(const Matrix& m) {
  const int64_t bytes = bytes_of(m.type);
  const bool aligned_rows = m.rows <= 1 || m.stride * bytes % kChunkBytes == 0;
  const bool chunked =
      reinterpret_cast<uintptr_t>(m.data) % kChunkBytes == 0 && aligned_rows && m.columns * bytes % kChunkBytes == 0;
  return {static_cast<char*>(m.data), m.stride * bytes,    static_cast<int>(m.rows), static_cast<int>(m.columns),
          m.type,                     chunked};
}

// Copies one tile of a matrix after the other, downwards or to the right, with zeros where the matrix ends. All threads
// of the block copy, each the same chunks of every tile. Rows that are not aligned chunks (not kChunked) are loaded
// element by element; loads of 16-bit elements are waited for.
template <class Tile, bool kDownwards, bool kChunked, int kThreads>
class TileReader {
 public:
  // length: how many rows, or columns, there are in its direction.
  MFT_DEVICE TileReader(const View& matrix, int first_row, int first_column, int length)
      : source_(matrix.at(first_row + row(), first_column + chunk() * Tile::kPerChunk)),
        matrix_(matrix),
        rows_((kDownwards ? length : matrix.rows - first_row) - row()),
        columns_((kDownwards ? matrix.columns - first_column : length) - chunk() * Tile::kPerChunk) {}

  MFT_DEVICE void copy(char* tile) {
    if (kThreads <= Tile::kRows * Tile::kChunks || row() < Tile::kRows) {
      char* const to = tile + Tile::offset(row(), chunk());
      for (int i = 0; i < kCopies; ++i) {
        copy_chunk(to + i * kStep * Tile::kRowBytes, source_ + i * kStep * matrix_.row_bytes,
                   i * kStep < rows_ ? columns_ : 0);
      }
    }
    if constexpr (kDownwards) {
      source_ += Tile::kRows * matrix_.row_bytes;
      rows_ -= Tile::kRows;
    } else {
      source_ += Tile::kRowBytes;
      columns_ -= Tile::kColumns;
    }
  }

 private:
  static constexpr int kStep = kThreads / Tile::kChunks;  // rows between two chunks of a thread
  static constexpr int kCopies = kStep > Tile::kRows ? 1 : Tile::kRows / kStep;
  static_assert(kStep % 8 == 0, "the swizzle is to be the same for all of a thread's chunks");

  MFT_DEVICE static int row() { return isa::thread() / Tile::kChunks; }
  MFT_DEVICE static int chunk() { return isa::thread() % Tile::kChunks; }

  MFT_DEVICE static void copy_chunk(char* to, const char* from, int columns) {
    if constexpr (kChunked) {
      isa::copy_async<kChunkBytes>(to, from, columns > 0);
    } else if constexpr (Tile::kElement == 4) {
      for (int i = 0; i < 4; ++i) isa::copy_async<4>(to + 4 * i, from + 4 * i, i < columns);
    } else {
      isa::Words4 chunk = {};
      for (int i = 0; i < 8; ++i) {
        const uint32_t element = i < columns ? load<uint16_t>(from + 2 * i) : 0;
        chunk.words[i / 2] |= element << (16 * (i % 2));
      }
      store(to, chunk);
    }
  }

  const char* source_;  // the thread's first chunk of the next tile
  const View& matrix_;  // an argument of the kernel: constant memory, no register
  int rows_, columns_;  // how many the matrix has left from there on, if any
};

// Load A of mma.sync, 16 rows and 16 depths. The tile's rows are the rows of A, or (kDepthDown) its depths.
template <class Tile, bool kDepthDown>
MFT_DEVICE void load_a(uint32_t (&a)[4], const char* tile, int row, int depth) {
  const int lane = isa::lane();
  if constexpr (kDepthDown) {
    const int first = Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    isa::load_matrices_transposed(a, tile + Tile::further(first, depth, row));
  } else {
    isa::load_matrices(a, tile + Tile::further(Tile::offset(lane % 16, lane / 16), row, depth));
  }
}

// Load two B of mma.sync, 16 depths and 2 x 8 columns: b[0], b[1] and b[2], b[3]. The tile's rows are the columns of B,
// or (kDepthDown) its depths.
template <class Tile, bool kDepthDown>
MFT_DEVICE void load_b(uint32_t (&b)[4], const char* tile, int column, int depth) {
  const int lane = isa::lane();
  if constexpr (kDepthDown) {
    isa::load_matrices_transposed(b, tile + Tile::further(Tile::offset(lane % 16, lane / 16), depth, column));
  } else {
    const int first = Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    isa::load_matrices(b, tile + Tile::further(first, column, depth));
  }
}

// The order of tiles: 8 tiles down, then one to the right. So blocks that run at the same time read few rows and
// columns of tiles.
struct TilePlace {
  int row, column;  // in tiles

  MFT_DEVICE static TilePlace of(int block, int rows, int columns) {
    constexpr int kBand = 8;
    const int band = block / (kBand * columns), in_band = block - band * kBand * columns;
    const int height = rows - band * kBand < kBand ? rows - band * kBand : kBand;
    return {band * kBand + in_band % height, in_band / height};
  }
};

constexpr int tiles_of(int64_t length, int tile) { return static_cast<int>((length + tile - 1) / tile); }

// Return the number of stages in shared memory: as many as let two blocks share a multiprocessor. If 2 stages are too
// many for that, as many as fit one block alone.
inline int stages_of(int stage_bytes, const Device& device) {
  constexpr int kMost = 4, kReserved = 1024;  // bytes of each block, for the system
  const int half = device.shared_bytes / 2 - kReserved, whole = device.shared_bytes - kReserved;
  return std::min(kMost, (half >= 2 * stage_bytes ? half : whole) / stage_bytes);
}

}  // namespace mft::cuda::sm80
