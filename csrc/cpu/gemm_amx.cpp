// The blocked GEMM of gemm.h in bf16 by tiles of AMX, packed by AVX-512.
//
// gemm_amx_emulated.cpp compiles this file once more, with the emulation of tiles.h.
#include <immintrin.h>

#include <cstring>

#include "gemm.h"
#include "tiles.h"

namespace mft {
namespace {

#include "gemm_parts.inl"
#include "gemm_pairs.inl"

constexpr int64_t kFour = 4;  // bytes of a group, and of a sum
constexpr int64_t kPanelStride = kTileColumns * kFour;
constexpr int64_t kBlockStride = kRowStride * kFour;

//              B: 16 columns  16 columns
//   A: 16 rows      tile 0      tile 1       4 products of 16 cycles for 4 loads of 8
//      16 rows      tile 2      tile 3
template <bool kTwoRows, bool kTwoColumns>
void multiply_tiles(float* tile, int64_t tile_stride, const uint32_t* a, const uint32_t* b, int64_t groups, bool add) {
  const int64_t stride = tile_stride * kFour;
  float* lower = tile + 16 * tile_stride;
  if (add) {
    tile_load<0>(tile, stride);
    if constexpr (kTwoColumns) tile_load<1>(tile + 16, stride);
    if constexpr (kTwoRows) tile_load<2>(lower, stride);
    if constexpr (kTwoRows && kTwoColumns) tile_load<3>(lower + 16, stride);
  } else {
    tile_zero<0>();
    if constexpr (kTwoColumns) tile_zero<1>();
    if constexpr (kTwoRows) tile_zero<2>();
    if constexpr (kTwoRows && kTwoColumns) tile_zero<3>();
  }
  for (int64_t g = 0; g < groups; g += kDepthStep, a += kDepthStep, b += kDepthStep * kTileColumns) {
    tile_load<4>(a, kBlockStride);
    tile_load<6>(b, kPanelStride);
    tile_add_product<0, 4, 6>();
    if constexpr (kTwoColumns) {
      tile_load<7>(b + 16, kPanelStride);
      tile_add_product<1, 4, 7>();
    }
    if constexpr (kTwoRows) {
      tile_load<5>(a + 16 * kRowStride, kBlockStride);
      tile_add_product<2, 5, 6>();
      if constexpr (kTwoColumns) tile_add_product<3, 5, 7>();
    }
  }
  tile_store<0>(tile, stride);
  if constexpr (kTwoColumns) tile_store<1>(tile + 16, stride);
  if constexpr (kTwoRows) tile_store<2>(lower, stride);
  if constexpr (kTwoRows && kTwoColumns) tile_store<3>(lower + 16, stride);
}

using MultiplyTiles = void (*)(float*, int64_t, const uint32_t*, const uint32_t*, int64_t, bool);
const MultiplyTiles kMultiplyTiles[2][2] = {{multiply_tiles<false, false>, multiply_tiles<false, true>},
                                            {multiply_tiles<true, false>, multiply_tiles<true, true>}};

void multiply(float* tile, int64_t tile_stride, const uint32_t* a, const uint32_t* b, int64_t rows, int64_t columns,
              int64_t groups, bool add, const char* const*) {
  kMultiplyTiles[rows > 16][columns > 16](tile, tile_stride, a, b, groups, add);
}

}  // namespace

#if defined(MFT_EMULATED_TILES)
const Gemm& emulated_amx_gemm() {
#else
const Gemm& amx_gemm() {
#endif
  static const Gemm table = [] {
    Gemm gemm = gemm_of_pairs();
    gemm.tile_rows = 32;
    gemm.whole_tiles = true;
    gemm.prefetch_groups = 0;  // loads of tiles and prefetches wait for the same line buffers (Sapphire Rapids)
    gemm.rows_ahead = 8;
    gemm.narrow_bytes = 1 << 20;
    gemm.tokens = gemm.grad_tokens = 1024;
    gemm.weight_rows = 256;
    gemm.grad_depth = 128;
    gemm.weight_columns = 512;
    gemm.task_columns = 2048;
    gemm.panels_bytes = 512 << 10;
    gemm.tiles_by_blocks = 16;
    gemm.begin = tile_begin;
    gemm.end = tile_end;
    gemm.multiply = multiply;
    return gemm;
  }();
  return table;
}

}  // namespace mft
