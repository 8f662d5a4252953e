// Pieces of a bf16 GEMM for AVX512-BF16 whose packing step masks: what a masked product costs beyond a dense one is
// only the reading of the mask. fused_linear.cpp puts the pieces together.
//
// A product C = A @ B is cut into tiles of C of up to 12 rows and 32 columns (24 of 32 registers), and its inner
// dimension ("depth") into blocks of up to 512. vdpbf16ps multiplies pairs of neighbours along the depth:
//
//   A block, row-major:  a[row * kRowStride + d]              one 32-bit pair of A is broadcast ...
//   B panel, by pairs:   b[pair * kTileColumns + column]      ... to 32 columns, a 32-bit pair each
//   C tile, fp32:        tile[row * tile_stride + column]
//
// Measured on one Zen 5 core: 545 GFLOP/s in this loop, 2 vdpbf16ps a cycle, at any of 12x2, 8x3, 6x4 vectors.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace mft {
namespace bfloat16 {

constexpr int64_t kTileRows = 12;
constexpr int64_t kTileColumns = 32;
constexpr int64_t kDepth = 512;
constexpr int64_t kRowStride = kDepth + 32;  // rows 1088 B apart: at 1024 B all rows of a tile would share L1 sets
constexpr int64_t kPrefetchBytes = 512;      // what one entry of multiply()'s list covers ...
constexpr int64_t kPrefetchPairs = 8;        // ... in so many pairs: a line a pair, 22 GB/s a core at full speed

// tile (rows, columns) = [tile +] A @ B over `pairs` pairs; columns are rounded up to 16 or 32.
// prefetch: nullptr, or an address for every kPrefetchPairs pairs, from which kPrefetchBytes are brought into L2.
void multiply(float* tile, int64_t tile_stride, const uint16_t* a, const uint32_t* b, int64_t rows, int64_t columns,
              int64_t pairs, bool add, const char* const* prefetch);

// Brings a tile's sums into L1: from L2 or L3 they would stall the start of the next multiply().
void prefetch_tile(const float* tile, int64_t tile_stride, int64_t rows);

// ---- packing; depths are zero-padded

// One row of an A block: the first `depth` elements of `row`, all or those that the mask keeps.
void pack_row(uint16_t* a, const uint16_t* row, int64_t depth);
void pack_masked_row(uint16_t* a, const uint16_t* row, MaskRow mask, Format score_format, int64_t depth);

// One pair of all B panels, which lie panel_stride apart: neighbours along the depth are two rows. odd: or nullptr.
void pack_row_pair(uint32_t* b, int64_t panel_stride, const uint16_t* even, const uint16_t* odd, int64_t columns);
void pack_masked_row_pair(uint32_t* b, int64_t panel_stride, const uint16_t* even, const uint16_t* odd,
                          MaskRow even_mask, MaskRow odd_mask, Format score_format, int64_t columns);

// One B panel of matrix.T: the neighbours along the depth are neighbours in a row; up to 32 rows of `matrix`.
void pack_transposed_panel(uint32_t* b, const uint16_t* matrix, int64_t row_stride, int64_t rows, int64_t depth);

// An A block of matrix.T: `depth` rows of `matrix`, whose columns become the rows of the block.
void pack_transposed_block(uint16_t* a, const uint16_t* matrix, int64_t row_stride, int64_t depth, int64_t columns);

// ---- what becomes of finished tiles

// out[j] = round(tile[j])
void store_row(uint16_t* out, const float* tile, int64_t columns);

// out[m * out_stride + n] = round(tile[n * tile_stride + m] + bias[n]); bias may be nullptr. tile padded to 16 columns.
void store_transposed(uint16_t* out, int64_t out_stride, const float* tile, int64_t tile_stride, int64_t rows,
                      int64_t columns, const uint16_t* bias);

// Where the score gradient of a matrix goes, and what it is made with.
struct ScoreGrad {
  void* out;
  Format out_format;
  const uint16_t* weight;  // nullptr: without that factor
  const void* scores;     // for the sign, or nullptr
  Format score_format;
  const uint32_t* words;  // for the sign, or nullptr
  int64_t columns;        // of the matrices; rows are contiguous
  bool accumulate;
  bool stream;            // write around the cache: out is larger than it, and its rows start on cache lines
};

// out[r, j] = round([out[r, j] +] tile[r * kTileColumns + j] * weight[r, j] * sign[r, j]), for a tile of `rows` and up
// to 32 columns at (row, column), column a multiple of 32.
void store_score_grad(const ScoreGrad& grad, const float* tile, int64_t row, int64_t rows, int64_t column);

// Brings what store_score_grad will read into L1.
void prefetch_score_grad(const ScoreGrad& grad, int64_t row, int64_t rows, int64_t column);

// Makes streamed writes visible to other threads.
void finish_streams();

}  // namespace bfloat16
}  // namespace mft
