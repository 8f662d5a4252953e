// One tile of a product in the general kernels: where a block and its warps are, the products of one step, and how sums
// are written, as the fp32 sums of a part or as results.
//
// A block's 8 warps form a grid of kWarpsDown x 8 / kWarpsDown, with tokens down and features across.
#pragma once

#include "tile_sm80.h"

namespace mft::cuda::sm80 {

struct ProductTileArguments {
  View out, in;
  const char* bias;  // or null
  int tile_rows, tile_columns;
  int stages;
  float* parts;    // (parts, out.rows, part_stride); null: the depth is one part
  int part_depth;  // of a part, whole steps
  int64_t part_stride;
};

// Return all arguments but tile_rows and stages.
template <class Arguments>
Arguments tile_arguments(const Product& p, const Plan& plan, int tile_depth) {
  Arguments a = {};
  a.out = view_of(p.out), a.in = view_of(p.in);
  a.bias = static_cast<const char*>(p.bias);
  a.tile_columns = tiles_of(p.out.columns, kTileFeatures);
  a.part_stride = static_cast<int64_t>(a.tile_columns) * kTileFeatures;
  if (plan.parts > 1) a.parts = static_cast<float*>(p.workspace);
  a.part_depth = tiles_of(tiles_of(p.in.columns, tile_depth), plan.parts) * tile_depth;
  return a;
}

template <class T>
MFT_DEVICE float bias_of(const char* bias, const View& out, int feature) {
  if (bias == nullptr || feature >= out.columns) return 0.0f;
  return isa::widen(load<T>(bias + 2 * static_cast<int64_t>(feature)));
}

struct ProductPlace {
  int token, feature;            // the block's first
  int warp_token, warp_feature;  // the warp's first, counted from there
};

template <class T, int kTokens, int kWarpsDown>
struct ProductTile {
  static constexpr int kWarpsAcross = kThreads / 32 / kWarpsDown;
  static constexpr int kWarpTokens = kTokens / kWarpsDown, kWarpFeatures = kTileFeatures / kWarpsAcross;
  static constexpr int kDown = kWarpTokens / 16, kAcross = kWarpFeatures / 8;  // mma.sync tiles in a warp's tile
  using Sums = float[kDown][kAcross][4];
  using Out = Tile<kTokens, kTileFeatures, 2>;

  // The compiler does not keep the results of shuffle() and warp() in registers between calls.
  MFT_DEVICE static ProductPlace place_of(const ProductTileArguments& a) {
    const TilePlace tile = TilePlace::of(isa::shuffle(static_cast<int>(isa::block(0)), 0), a.tile_rows, a.tile_columns);
    return place_at(tile.row, tile.column);
  }

  // row, column: in tiles.
  MFT_DEVICE static ProductPlace place_at(int row, int column) {
    return {row * kTokens, column * kTileFeatures, isa::warp() / kWarpsAcross * kWarpTokens,
            isa::warp() % kWarpsAcross * kWarpFeatures};
  }

  // Multiply one step. The rows of Weight are features, or (kDepthDown) depths. select is applied to each fragment of
  // the weight, with the column in the warp's tile and the depth where the fragment begins.
  template <class In, class Weight, bool kDepthDown, class Select>
  MFT_DEVICE static void multiply(Sums& sums, const char* in_tile, const char* weight_tile, int warp_token,
                                  int warp_feature, const Select& select) {
    constexpr int kDepth = In::kColumns;
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t weight[kAcross / 2][4];
#pragma unroll
      for (int j = 0; j < kAcross / 2; ++j) {
        load_b<Weight, kDepthDown>(weight[j], weight_tile, warp_feature + 16 * j, depth);
        select(weight[j], 16 * j, depth);
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {  // one fragment of `in` at a time: 128 registers leave no room for all
        uint32_t in[4];
        load_a<In, false>(in, in_tile, warp_token + 16 * i, depth);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          isa::multiply_16x8x16<T>(sums[i][j], in, weight[j / 2][j % 2 * 2], weight[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Four lanes write a sector.
  MFT_DEVICE static void write_part(const ProductTileArguments& a, const Sums& sums, const ProductPlace& place) {
    struct alignas(8) Two {
      float low, high;
    };
    const int64_t first_row = isa::block(1) * a.out.rows;
    const int g = isa::lane() / 4, c = isa::lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kDown; ++i) {
      const int token = place.token + place.warp_token + 8 * i + g;
      if (token >= a.out.rows) continue;
      float* const to = a.parts + (first_row + token) * a.part_stride + place.feature + place.warp_feature + c;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const float(&four)[4] = sums[i / 2][j];
        store(reinterpret_cast<char*>(to + 8 * j), Two{four[i % 2 * 2], four[i % 2 * 2 + 1]});
      }
    }
  }

  // Write through shared memory, so that 16 bytes are written at once.
  MFT_DEVICE static void write(const ProductTileArguments& a, const Sums& sums, char* shared, const ProductPlace& place) {
    const int first_token = place.token, first_feature = place.feature;
    const int g = isa::lane() / 4, c = isa::lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      const int feature = place.warp_feature + 8 * j + c;
      const float low = bias_of<T>(a.bias, a.out, first_feature + feature);
      const float high = bias_of<T>(a.bias, a.out, first_feature + feature + 1);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        for (int half = 0; half < 2; ++half) {
          const int token = place.warp_token + 16 * i + 8 * half + g;
          const uint32_t pair = isa::round_pair<T>(sums[i][j][2 * half] + low, sums[i][j][2 * half + 1] + high);
          store(shared + Out::offset_of(token, feature), pair);
        }
      }
    }
    isa::sync_block();
    for (int at = isa::thread(); at < kTokens * Out::kChunks; at += kThreads) {
      const int token = at / Out::kChunks, chunk = at % Out::kChunks;
      const int left = a.out.columns - first_feature - 8 * chunk;
      if (first_token + token >= a.out.rows || left <= 0) continue;
      const char* const from = shared + Out::offset(token, chunk);
      char* const to = a.out.at(first_token + token, first_feature + 8 * chunk);
      if (a.out.chunked) {
        store(to, load<isa::Words4>(from));
      } else {
        for (int i = 0; i < 8 && i < left; ++i) store(to + 2 * i, load<uint16_t>(from + 2 * i));
      }
    }
  }
};

}  // namespace mft::cuda::sm80
