// The blocked GEMM of gemm.h in bf16 by tiles of AMX, packed by AVX-512.
//
// gemm_amx_emulated.cpp compiles this file again with the emulation in tiles.h.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

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

// 32 columns of each of 16 rows are masked into a tile of A in L1, some steps before it is multiplied. A tile can be
// loaded only when what was stored there has left the store buffer. 4096 x 4096 on Sapphire Rapids, 2 threads, in ms:
//
//                                   16 tokens   64 tokens
//   masked some steps before          1.40        1.65
//   masked and multiplied at once     1.80        2.35
//   torch's dense product             1.75        2.75
constexpr int64_t kStepsAhead = 4, kRing = 2 * kStepsAhead;
constexpr int64_t kTileGroups = kFarRows * kDepthStep;

template <int kTokenTiles, typename F>
inline void for_token_tiles(F f) {
  f(std::integral_constant<int, 0>{});
  if constexpr (kTokenTiles > 1) f(std::integral_constant<int, 1>{});
  if constexpr (kTokenTiles > 2) f(std::integral_constant<int, 2>{});
  if constexpr (kTokenTiles > 3) f(std::integral_constant<int, 3>{});
}

template <int kTokenTiles, typename Keep>
void multiply_far_tiles(float* sums, int64_t stride, const void* const* rows, const MaskRow* masks,
                        const uint32_t* b, int64_t depth, FarFetch fetch) {
  constexpr int64_t kWidth = kTokenTiles > 1 ? kTileColumns : 16;
  const int64_t steps = (depth + 31) / 32, panel_stride = steps * kDepthStep * kWidth;
  alignas(64) uint32_t ring[kRing * kTileGroups];
  const auto mask = [&](int64_t step) {
    uint32_t* a = ring + step % kRing * kTileGroups;
    for (int64_t r = fetch.first; r < fetch.end; ++r) {
      _mm_prefetch(static_cast<const char*>(rows[r]) + 64 * step + fetch.bytes, _MM_HINT_T1);
    }
    for (int64_t r = 0, column = 32 * step; r < kFarRows; ++r, a += kDepthStep) {
      const uint16_t* from = as<uint16_t>(rows[r]) + column;
      _mm512_store_si512(a, _mm512_maskz_loadu_epi16(Keep(masks[r])(column, depth - column), from));
    }
  };
  for_token_tiles<kTokenTiles>([](auto t) { tile_zero<t>(); });
  for (int64_t step = 0; step < kStepsAhead && step < steps; ++step) mask(step);
  for (int64_t step = 0; step < steps; ++step, b += kDepthStep * kWidth) {
    if (step + kStepsAhead < steps) mask(step + kStepsAhead);
    tile_load<4>(ring + step % kRing * kTileGroups, kDepthStep * kFour);
    for_token_tiles<kTokenTiles>([&](auto t) {
      tile_load<5 + t % 2>(b + t / 2 * panel_stride + t % 2 * 16, kWidth * kFour);
      tile_add_product<t, 4, 5 + t % 2>();
    });
  }
  for_token_tiles<kTokenTiles>([&](auto t) { tile_store<t>(sums + 16 * t, stride * kFour); });
}

void multiply_far_rows(float* sums, int64_t stride, const void* const* rows, const MaskRow* masks, Format score_format,
                       const uint32_t* panels, int64_t depth, int64_t tokens, FarFetch fetch) {
  with_keep(masks[0], score_format, [&](auto keep) {
    using Keep = decltype(keep);
    constexpr decltype(&multiply_far_tiles<1, Keep>) kBy[] = {multiply_far_tiles<1, Keep>, multiply_far_tiles<2, Keep>,
                                                              multiply_far_tiles<3, Keep>, multiply_far_tiles<4, Keep>};
    kBy[(tokens - 1) / 16](sums, stride, rows, masks, panels, depth, fetch);
  });
}

// The same for d_x by words. 32 columns of 32 rows become two tiles of B, and the tiles of grad_output stay in
// registers for all columns. 4096 x 4096, in ms:
//
//                                        this way   packed by blocks
//   16 tokens                              1.8            3.0
//   64 tokens                              3.0            3.7
//   128 tokens: L2 cannot keep the sums    5.5            4.3
//   from scores: too many streams          5.8            6.3
//   from scores, a layer in L3             5.9            4.6
template <int kTokenTiles>
void add_near_tiles(float* tiles, int64_t tiles_size, const uint32_t* a, const void* const* rows,
                    const uint32_t* const* words, int64_t columns, bool add) {
  constexpr int64_t kNearBytesAhead = 128;
  alignas(64) uint32_t ring[kRing * 2 * kTileGroups];
  const auto row_of = [&](int64_t r, int64_t step) {
    const uint16_t* from = as<uint16_t>(rows[r]) + 32 * step;
    _mm_prefetch(reinterpret_cast<const char*>(from) + kNearBytesAhead, _MM_HINT_T0);
    return _mm512_maskz_loadu_epi16(words[r][step] & low_bits(columns - 32 * step), from);
  };
  const auto mask = [&](int64_t step) {
    uint32_t* b = ring + step % kRing * 2 * kTileGroups;
    for (int64_t r = 0; r < kNearRows; r += 2, b += kDepthStep) {
      interleave(b, kTileGroups, row_of(r, step), row_of(r + 1, step));
    }
  };
  for_token_tiles<kTokenTiles>([&](auto t) { tile_load<4 + t>(a + 16 * t * kRowStride, kBlockStride); });
  const int64_t steps = (columns + 31) / 32;
  for (int64_t step = 0; step < kStepsAhead && step < steps; ++step) mask(step);
  for (int64_t step = 0; step < steps; ++step, tiles += tiles_size) {
    if (step + kStepsAhead < steps) mask(step + kStepsAhead);
    for (int64_t half = 0; half < 2; ++half) {
      tile_load<3>(ring + (step % kRing * 2 + half) * kTileGroups, kDepthStep * kFour);
      for_token_tiles<kTokenTiles>([&](auto t) {
        float* tile = tiles + t * 16 * kTileColumns + 16 * half;
        add ? tile_load<t % 3>(tile, kPanelStride) : tile_zero<t % 3>();
        tile_add_product<t % 3, 4 + t, 3>();
        tile_store<t % 3>(tile, kPanelStride);
      });
    }
  }
}

void add_near_rows(float* tiles, int64_t tiles_size, const uint32_t* a, const void* const* rows,
                   const uint32_t* const* words, int64_t tokens, int64_t columns, bool add) {
  constexpr decltype(&add_near_tiles<1>) kBy[] = {add_near_tiles<1>, add_near_tiles<2>, add_near_tiles<3>,
                                                  add_near_tiles<4>};
  kBy[(tokens - 1) / 16](tiles, tiles_size, a, rows, words, columns, add);
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
    gemm.prefetch_groups = 0;  // tile loads and prefetches wait for the same line buffers (Sapphire Rapids)
    gemm.rows_ahead = 8;
    gemm.narrow_bytes = 1 << 20;
    gemm.tokens = gemm.grad_tokens = 1024;
    gemm.weight_rows = 256;
    gemm.grad_depth = 128;
    gemm.weight_columns = 512;
    gemm.task_columns = 2048;
    // d_scores of 4096 x 4096, in ms:
    //
    //                             as here   32 rows, 512 columns at a time
    //   64 tokens                   3.0        4.7
    //   64 tokens, fp32 scores      5.8        9.9
    //   512 tokens                  9.9       12.1
    //   512 tokens, fp32 scores    16.7       18.9
    gemm.factor_rows = 16;
    gemm.factors_ahead = 128;
    gemm.panels_bytes = 1 << 20;  // half of L2
    gemm.tiles_by_blocks = 16;
    gemm.begin = tile_begin;
    gemm.end = tile_end;
    gemm.multiply = multiply;
    gemm.multiply_far_rows = multiply_far_rows;
    gemm.add_near_rows = add_near_rows;
    return gemm;
  }();
  return table;
}

}  // namespace mft
