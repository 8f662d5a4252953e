// A blocked GEMM whose packing step masks: what a masked product costs beyond a dense one is only the reading of the
// mask. One table of functions an instruction set and format; fused_linear.cpp puts the pieces together.
//
// A product C = A @ B is cut into tiles of C of up to 32 columns, and its inner dimension ("depth") into blocks. Along the
// depth, operands are packed in groups of 32 bits: one fp32, or two neighbours of bf16. Packed depths are filled up with
// zeros to a multiple of 16 groups.
//
//   A block, row-major:    a[row * kRowStride + group]
//   B panel, by groups:    b[group * kTileColumns + column]
//   C tile, fp32:          tile[row * tile_stride + column]
//
// With AVX-512 a group of A is broadcast to 32 columns; as tiles of AMX both operands are read as they lie here.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace mft {

constexpr int64_t kTileColumns = 32;
constexpr int64_t kDepth = 256;             // groups
constexpr int64_t kRowStride = kDepth + 16;  // rows 1088 B apart: at 1024 B all rows of a tile would share L1 sets
constexpr int64_t kDepthStep = 16;          // groups: a row of a tile of AMX
constexpr int64_t kPrefetchBytes = 512;     // what one entry of multiply()'s list covers
constexpr int64_t kFarRows = 16, kNearRows = 32;  // of the weight, that multiply_far_rows() and add_near_rows() take,
constexpr int64_t kFewTileTokens = 64;            // and tokens at most;
constexpr int64_t kMostFarTokens = 128;           // the first in turns, for which L2 keeps the rows: 256 are 1.3 times as slow

// Where the score gradient of a matrix goes, and what it is made with.
struct ScoreGrad {
  void* out;
  Format out_format;
  const void* weight;     // nullptr: without that factor
  const void* scores;     // for the sign, or nullptr
  Format score_format;
  const uint32_t* words;  // for the sign, or nullptr
  int64_t columns;        // of the matrices; rows are contiguous
  bool accumulate;
  bool stream;            // write around the cache: out is larger than it, and its rows start on cache lines
};

struct Gemm {
  Format format;      // of every matrix but scores and their gradient
  int64_t per_group;  // elements of it along the depth in a group
  int64_t tile_rows;
  // Whether multiply() reads and writes all rows of a tile, whatever it is asked for: then tiles begin at multiples of
  // tile_rows, and there is memory behind the last.
  bool whole_tiles;
  int64_t prefetch_groups;  // in which multiply() asks for an entry of its list; 0: it takes none
  int64_t rows_ahead;       // of the weight, to be brought in while others are packed; 0: multiply()'s list alone does it
  int64_t narrow_bytes;     // of packed x, up to which a tile's rows of the weight meet all tokens at once; 0: never
  int64_t tokens, grad_tokens;  // for which the sums of a block are kept: of the forward, of d_x
  int64_t weight_rows;      // of a block of the forward and the score gradient, a multiple of tile_rows
  int64_t grad_depth;      // groups in a block of d_x; divides kDepth
  int64_t weight_columns;  // of the weight in such a block, a multiple of 32
  int64_t task_columns;    // of the weight in a task of d_x, at most
  // Rows of a tile of the score gradient: the weight, the scores and the gradient of each are a stream of memory, and how
  // many columns ahead of the tiles they are brought in; 0: the tiles go down all rows of a block, unless x stays cached.
  int64_t factor_rows, factors_ahead;
  int64_t panels_bytes;  // of packed x that are read again for every such tile's rows
  int64_t tiles_by_blocks;  // side by side, whose sums it keeps from block to block of the depth; 0: each tile's at once

  // Around all multiplications of a thread; nullptr: nothing to do.
  void (*begin)();
  void (*end)();

  // tile (rows, columns) = [tile +] A @ B over `groups` groups; columns are rounded up to 16 or 32.
  // prefetch: nullptr, or an address for every prefetch_groups groups, from which kPrefetchBytes are brought into L2.
  void (*multiply)(float* tile, int64_t tile_stride, const uint32_t* a, const uint32_t* b, int64_t rows,
                   int64_t columns, int64_t groups, bool add, const char* const* prefetch);

  // sums[i * stride + m] = row i of the weight, masked, times token m: kFarRows rows that may lie far apart, a stream of
  // memory each, masked as they come. A panel of x.T has the whole depth of 32 tokens. nullptr: the table has no such way.
  void (*multiply_far_rows)(float* sums, int64_t stride, const void* const* rows, const MaskRow* masks,
                            Format score_format, const uint32_t* panels, int64_t panel_stride, int64_t depth,
                            int64_t tokens);

  // tiles [+]= tokens of an A block times kNearRows rows of the weight, masked by words as they come; a tile of all tokens
  // and 32 columns is tiles_size away from the next. nullptr: the table has no such way.
  void (*add_near_rows)(float* tiles, int64_t tiles_size, const uint32_t* a, const void* const* rows,
                        const uint32_t* const* words, int64_t tokens, int64_t columns, bool add);

  // Brings a tile's sums into L1: from L2 or L3 they would stall the start of the next multiply().
  void (*prefetch_tile)(const float* tile, int64_t tile_stride, int64_t rows);

  // ---- packing

  // One row of an A block: the first `depth` elements of `row`, all or those that the mask keeps.
  void (*pack_row)(uint32_t* a, const void* row, int64_t depth);
  void (*pack_masked_row)(uint32_t* a, const void* row, MaskRow mask, Format score_format, int64_t depth);

  // One group of all B panels, which lie panel_stride apart: neighbours along the depth are rows. odd: the second of two
  // neighbours, or nullptr for zeros.
  void (*pack_group)(uint32_t* b, int64_t panel_stride, const void* even, const void* odd, int64_t columns);
  void (*pack_masked_group)(uint32_t* b, int64_t panel_stride, const void* even, const void* odd, MaskRow even_mask,
                            MaskRow odd_mask, Format score_format, int64_t columns);

  // One B panel of matrix.T: the neighbours along the depth are neighbours in a row; up to 32 rows of `matrix`.
  void (*pack_transposed_panel)(uint32_t* b, const void* matrix, int64_t row_stride, int64_t rows, int64_t depth);

  // An A block of matrix.T: `depth` rows of `matrix`, whose columns become the rows of the block; a multiple of 32 of
  // them is written.
  void (*pack_transposed_block)(uint32_t* a, const void* matrix, int64_t row_stride, int64_t depth, int64_t columns);

  // ---- what becomes of finished tiles

  // out[j] = round(tile[j])
  void (*store_row)(void* out, const float* tile, int64_t columns);

  // out[m * out_stride + n] = round(tile[n * tile_stride + m] + bias[n]); bias may be nullptr. tile padded to 16 columns.
  void (*store_transposed)(void* out, int64_t out_stride, const float* tile, int64_t tile_stride, int64_t rows,
                           int64_t columns, const void* bias);

  // out[r, j] = round([out[r, j] +] tile[r * kTileColumns + j] * weight[r, j] * sign[r, j]), for a tile of `rows` and up
  // to 32 columns at (row, column), column a multiple of 32.
  void (*store_score_grad)(const ScoreGrad& grad, const float* tile, int64_t row, int64_t rows, int64_t column);

  // Brings what store_score_grad will read of these rows and columns into the cache; no more than there is, nothing of
  // less than one row.
  void (*prefetch_score_grad)(const ScoreGrad& grad, int64_t row, int64_t rows, int64_t column, int64_t columns);

  // Makes streamed writes visible to other threads.
  void (*finish_streams)();
};

constexpr int64_t kMostTileRows = 32;  // of any table

// By tiles of AMX, or an emulation of them for tests; by AVX512-BF16; by AVX-512, formats widened to fp32.
const Gemm& amx_gemm();
const Gemm& emulated_amx_gemm();
const Gemm& bfloat16_gemm();
const Gemm& float32_gemm(Format format);

}  // namespace mft
