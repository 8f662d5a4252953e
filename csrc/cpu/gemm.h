// A blocked GEMM that masks while it packs. Compared with a dense product, a masked product only has to read the mask
// in addition. There is one table of functions per instruction set and format; fused_linear.cpp puts the pieces
// together.
//
// A product C = A @ B is cut into tiles of C of up to 32 columns, and its inner dimension ("depth") into blocks. Along
// the depth, operands are packed in groups of 32 bits: one fp32, or two neighbouring bf16. Packed depths are padded
// with zeros to a multiple of 16 groups.
//
//   A block, row-major:    a[row * kRowStride + group]
//   B panel, by groups:    b[group * kTileColumns + column]
//   C tile, fp32:          tile[row * tile_stride + column]
//
// AVX-512 broadcasts a group of A to 32 columns. AMX loads its tiles of both operands directly from this layout.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace mft {

constexpr int64_t kTileColumns = 32;
constexpr int64_t kDepth = 256;             // groups
constexpr int64_t kRowStride = kDepth + 16;  // rows 1088 B apart: at 1024 B all rows of a tile would share L1 sets
constexpr int64_t kDepthStep = 16;          // groups in a row of an AMX tile
constexpr int64_t kPrefetchBytes = 512;     // what one entry of multiply()'s list covers
// Rows of the weight in a call of multiply_far_rows() and of add_near_rows(), and the most tokens in a call of either.
constexpr int64_t kFarRows = 16, kNearRows = 32;
constexpr int64_t kFewTileTokens = 64;
// The most tokens for multiply_far_rows(), in several calls. L2 keeps the rows between them. 256 are 1.3 times as slow.
constexpr int64_t kMostFarTokens = 128;

// The output of the score gradient of a matrix, and its factors.
struct ScoreGrad {
  void* out;
  Format out_format;
  const void* weight;     // nullptr: no weight factor
  const void* scores;     // for the sign, or nullptr
  Format score_format;
  const uint32_t* words;  // for the sign, or nullptr
  int64_t columns;        // of the matrices; rows are contiguous
  bool accumulate;
  bool stream;            // write around the cache: out exceeds it, and its rows start on cache lines
};

// What multiply_far_rows() prefetches into L2: `bytes` ahead of each column, in rows first .. end - 1 of its call.
struct FarFetch {
  int64_t first, end, bytes;
};

struct Gemm {
  Format format;      // of every matrix except scores and their gradient
  int64_t per_group;  // elements of that format in a group
  int64_t tile_rows;
  // Whether multiply() always reads and writes all rows of a tile. If so, tiles begin at multiples of tile_rows, and
  // there is memory behind the last tile.
  bool whole_tiles;
  int64_t prefetch_groups;  // groups per entry of multiply()'s prefetch list; 0: it takes no list
  int64_t rows_ahead;       // rows from the packed one to a prefetched one; 0: only multiply()'s list prefetches
  int64_t narrow_bytes;     // size of packed x up to which a tile's rows meet all tokens at once; 0: never
  int64_t tokens, grad_tokens;  // tokens whose sums are kept for a block, in the forward and in d_x
  int64_t weight_rows;      // rows in a block of the forward and the score gradient, a multiple of tile_rows
  int64_t grad_depth;      // groups in a block of d_x; divides kDepth
  int64_t weight_columns;  // columns of the weight in such a block, a multiple of 32
  int64_t task_columns;    // most columns of the weight in a task of d_x
  // factor_rows: rows in a tile of the score gradient. The weight, scores and gradient of each row are a stream of
  // memory.
  // factors_ahead: columns from a tile to the weight, scores and gradient that are prefetched for later tiles. 0: two
  // tiles ahead if x stays cached, else only what the tile itself needs.
  int64_t factor_rows, factors_ahead;
  int64_t panels_bytes;  // bytes of packed x that stay cached for the next tile's rows; 0: one panel
  int64_t tiles_by_blocks;  // tiles whose sums are kept between blocks of the depth; 0: none

  // Called before and after all multiplications of a thread; nullptr: nothing to do.
  void (*begin)();
  void (*end)();

  // tile (rows, columns) = [tile +] A @ B over `groups` groups; columns are rounded up to 16 or 32.
  // prefetch: nullptr, or an address for every prefetch_groups groups; kPrefetchBytes from it are prefetched into L2.
  void (*multiply)(float* tile, int64_t tile_stride, const uint32_t* a, const uint32_t* b, int64_t rows,
                   int64_t columns, int64_t groups, bool add, const char* const* prefetch);

  // sums[i * stride + m] = row i of the weight, masked, times token m, for kFarRows rows. The rows may lie far apart,
  // each a stream of memory, and are masked as they are read. A panel of x.T has the whole depth of 32 tokens, or of 16
  // if there are no more. nullptr: the table has no such function.
  void (*multiply_far_rows)(float* sums, int64_t stride, const void* const* rows, const MaskRow* masks,
                            Format score_format, const uint32_t* panels, int64_t depth, int64_t tokens, FarFetch fetch);

  // tiles [+]= tokens of an A block times kNearRows rows of the weight, which are masked by words as they are read. A
  // tile has all tokens and 32 columns; tiles are tiles_size apart. nullptr: the table has no such function.
  void (*add_near_rows)(float* tiles, int64_t tiles_size, const uint32_t* a, const void* const* rows,
                        const uint32_t* const* words, int64_t tokens, int64_t columns, bool add);

  // Prefetches a tile's sums into L1. From L2 or L3 they would stall the start of the next multiply().
  void (*prefetch_tile)(const float* tile, int64_t tile_stride, int64_t rows);

  // ---- packing

  // Packs one row of an A block: the first `depth` elements of `row`, all of them or those that the mask keeps.
  void (*pack_row)(uint32_t* a, const void* row, int64_t depth);
  void (*pack_masked_row)(uint32_t* a, const void* row, MaskRow mask, Format score_format, int64_t depth);

  // Packs one group of all B panels, which lie panel_stride apart. Neighbours along the depth are the rows `even` and
  // `odd`; odd may be nullptr for zeros.
  void (*pack_group)(uint32_t* b, int64_t panel_stride, const void* even, const void* odd, int64_t columns);
  void (*pack_masked_group)(uint32_t* b, int64_t panel_stride, const void* even, const void* odd, MaskRow even_mask,
                            MaskRow odd_mask, Format score_format, int64_t columns);

  // Packs one B panel of matrix.T, `columns` wide (16 or 32), from up to as many rows of `matrix`. Neighbours along the
  // depth are neighbours in a row.
  void (*pack_transposed_panel)(uint32_t* b, int64_t columns, const void* matrix, int64_t row_stride, int64_t rows,
                                int64_t depth);

  // Packs an A block of matrix.T from `depth` rows of `matrix`, whose columns become the rows of the block. Up to the
  // next multiple of 32, more rows may be written.
  void (*pack_transposed_block)(uint32_t* a, const void* matrix, int64_t row_stride, int64_t depth, int64_t columns);

  // ---- storing finished tiles

  // out[j] = round(tile[j])
  void (*store_row)(void* out, const float* tile, int64_t columns);

  // out[m * out_stride + n] = round(tile[n * tile_stride + m] + bias[n]); bias may be nullptr. The tile is padded to a
  // multiple of 16 columns.
  void (*store_transposed)(void* out, int64_t out_stride, const float* tile, int64_t tile_stride, int64_t rows,
                           int64_t columns, const void* bias);

  // out[r, j] = round([out[r, j] +] tile[r * kTileColumns + j] * weight[r, j] * sign[r, j]), for a tile of `rows` rows
  // and up to 32 columns at (row, column). column is a multiple of 32.
  void (*store_score_grad)(const ScoreGrad& grad, const float* tile, int64_t row, int64_t rows, int64_t column);

  // Prefetches what store_score_grad() will read of these rows and columns. Columns past the end are skipped; without
  // rows or columns it does nothing.
  void (*prefetch_score_grad)(const ScoreGrad& grad, int64_t row, int64_t rows, int64_t column, int64_t columns);

  // Makes streamed writes visible to other threads.
  void (*finish_streams)();
};

constexpr int64_t kMostTileRows = 32;  // the most of any table

// The tables: AMX tiles, their emulation for tests, AVX512-BF16, and AVX-512 with formats widened to fp32.
const Gemm& amx_gemm();
const Gemm& emulated_amx_gemm();
const Gemm& bfloat16_gemm();
const Gemm& float32_gemm(Format format);

}  // namespace mft
