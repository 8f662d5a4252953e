// out = in @ where(keep, weight, 0).T + bias, and with the weight transposed (d_x), by mma.sync: for any GPU from sm_80
// on, any alignment and any stride.
//
//            depth        out (tokens, features): one block a tile, 8 warps of 2 x 4, 32 features each
//          +-------+
//   tokens |  in   |      in and weight, and with it scores or words, stream through shared memory in 2 to 4 stages of
//          +-------+      32 depths (cp.async). ldmatrix gives a warp the fragments; those of the weight are masked in
//          +-------+      registers, by each of the two warps that need them.
//   features weight|
//          +-------+      depth is K; transposed, it is N, and the weight's tile has depths as rows (ldmatrix.trans).
//
// A step of 32 depths takes a warp 32 mma.sync among 206 instructions with bf16 scores (SASS of nvcc 13.0), and 128
// registers allow two blocks a multiprocessor. Speed: not measured.
#pragma once

#include <algorithm>

#include "mask_sm80.h"

namespace mft::cuda::sm80 {

struct ProductArguments {
  View out, in, weight;
  KeepArguments keep;
  const char* bias;  // or null
  int depth_tiles, tile_rows, tile_columns;
};

// T: of in, weight and out. S: of the scores, or Words. kChunked: in, weight and scores are. kTokens: 128 or 64 a tile.
template <class T, class S, bool kMagnitude, bool kTransposed, bool kChunked, int kTokens>
struct ProductKernel {
  static constexpr int kThreads = sm80::kThreads;
  static constexpr int kBlocksPerMultiprocessor = kChunked ? 2 : 1;  // one: loads by elements need registers
  using Arguments = ProductArguments;

  using Mask = sm80::Mask<S, kMagnitude, kTransposed, kChunked>;
  using In = Tile<kTokens, kTileDepth, 2>;
  using Weight = WeightTile<kTransposed, 2>;
  using Out = Tile<kTokens, kTileFeatures, 2>;
  static constexpr int kStageBytes = In::kBytes + Weight::kBytes + Mask::kBytes;
  static constexpr int kStages = std::min(4, 80 * 1024 / kStageBytes);  // two blocks in sm_80's 164 KiB
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kStages >= 2 && kStageBytes % 128 == 0 && Out::kBytes <= kSharedBytes);

  static constexpr int kWarpTokens = kTokens / 2;
  static constexpr int kDown = kWarpTokens / 16, kAcross = kWarpFeatures / 8;  // mma.sync's tiles in a warp's
  using Sums = float[kDown][kAcross][4];

  MFT_DEVICE static void run(const Arguments& a) {
    const TilePlace place = TilePlace::of(static_cast<int>(isa::block(0)), a.tile_rows, a.tile_columns);
    const int first_token = place.row * kTokens, first_feature = place.column * kTileFeatures;
    const int warp_token = isa::warp() / 4 * kWarpTokens, warp_feature = isa::warp() % 4 * kWarpFeatures;
    char* const shared = isa::shared_memory();

    TileReader<In, false, kChunked, kThreads> in(a.in, first_token, 0);
    TileReader<Weight, kTransposed, kChunked, kThreads> weight(a.weight, kTransposed ? 0 : first_feature,
                                                               kTransposed ? first_feature : 0);
    Mask mask(a.keep, first_feature, warp_feature);
    const auto copy = [&](int stage) {
      char* const to = shared + stage * kStageBytes;
      in.copy(to);
      weight.copy(to + In::kBytes);
      mask.copy(to + In::kBytes + Weight::kBytes);
      isa::commit_copies();
    };

    Sums sums = {};
    for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);
    for (int tile = 0, stage = 0, done = kStages - 1; tile < a.depth_tiles; ++tile) {
      isa::wait_copies<kStages - 2>();
      isa::sync_block();  // the tile has come for all, and all are done with the one before it, which is overwritten
      copy(done);
      multiply(sums, mask, shared + stage * kStageBytes, warp_token, warp_feature);
      done = stage;
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    isa::wait_copies<0>();
    isa::sync_block();
    // Found again, for registers are short in the loop.
    write(a, sums, shared, first_token, first_feature, isa::warp() / 4 * kWarpTokens, isa::warp() % 4 * kWarpFeatures);
  }

 private:
  MFT_DEVICE static void multiply(Sums& sums, Mask& mask, const char* stage, int warp_token, int warp_feature) {
    const char* const weight_tile = stage + In::kBytes;
#pragma unroll
    for (int depth = 0; depth < kTileDepth; depth += 16) {
      uint32_t weight[kAcross / 2][4];
#pragma unroll
      for (int j = 0; j < kAcross / 2; ++j) {
        load_b<Weight, kTransposed>(weight[j], weight_tile, warp_feature + 16 * j, depth);
        mask.select(weight[j], weight_tile + Weight::kBytes, 16 * j, depth);
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {  // one fragment of `in` at a time: 128 registers leave no room for all
        uint32_t in[4];
        load_a<In, false>(in, stage, warp_token + 16 * i, depth);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          isa::multiply_16x8x16<T>(sums[i][j], in, weight[j / 2][j % 2 * 2], weight[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // By way of shared memory, so that 16 bytes are written at once.
  MFT_DEVICE static void write(const Arguments& a, const Sums& sums, char* shared, int first_token, int first_feature,
                               int warp_token, int warp_feature) {
    const int g = isa::lane() / 4, c = isa::lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      const int feature = warp_feature + 8 * j + c;
      const float low = bias_of(a, first_feature + feature), high = bias_of(a, first_feature + feature + 1);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        for (int half = 0; half < 2; ++half) {
          const int token = warp_token + 16 * i + 8 * half + g;
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

  MFT_DEVICE static float bias_of(const Arguments& a, int feature) {
    if (a.bias == nullptr || feature >= a.out.columns) return 0.0f;
    return isa::widen(load<T>(a.bias + 2 * static_cast<int64_t>(feature)));
  }
};

template <class T, class S, bool kMagnitude, bool kTransposed>
std::string launch_product(const Product& p, const Device& device) {
  ProductArguments a = {};
  a.out = view_of(p.out), a.in = view_of(p.in), a.weight = view_of(p.weight);
  a.keep = keep_arguments(p.keep, p.weight);
  a.bias = static_cast<const char*>(p.bias);
  a.depth_tiles = tiles_of(p.in.columns, kTileDepth);
  a.tile_columns = tiles_of(p.out.columns, kTileFeatures);
  const auto start = [&](auto kernel, int tokens) {
    using Kernel = decltype(kernel);
    a.tile_rows = tiles_of(p.out.rows, tokens);
    LaunchShape shape;
    shape.x = static_cast<int64_t>(a.tile_rows) * a.tile_columns;
    shape.shared_bytes = Kernel::kSharedBytes;
    if (shape.x > kLongestSide) return std::string("x has too many tokens, 2^31 tiles and more; split them");
    return isa::launch<Kernel>(shape, device.stream, a);
  };
  if (!a.in.chunked || !a.weight.chunked || !a.keep.scores.chunked) {
    return start(ProductKernel<T, S, kMagnitude, kTransposed, false, 128>{}, 128);
  }
  if (p.out.rows <= 64) return start(ProductKernel<T, S, kMagnitude, kTransposed, true, 64>{}, 64);
  return start(ProductKernel<T, S, kMagnitude, kTransposed, true, 128>{}, 128);
}

template <class T, class S, bool kTransposed>
std::string product_by_scores(const Product& p, const Device& device) {
  return p.keep.magnitude ? launch_product<T, S, true, kTransposed>(p, device)
                          : launch_product<T, S, false, kTransposed>(p, device);
}

template <class T, bool kTransposed>
std::string product_by(const Product& p, const Device& device) {
  if (p.keep.words != nullptr) return launch_product<T, Words, true, kTransposed>(p, device);
  switch (p.keep.scores.type) {
    case Type::kFloat32:
      return product_by_scores<T, float, kTransposed>(p, device);
    case Type::kBFloat16:
      return product_by_scores<T, BFloat16, kTransposed>(p, device);
    default:
      return product_by_scores<T, Float16, kTransposed>(p, device);
  }
}

template <class T>
std::string product_of(const Product& p, const Device& device) {
  return p.transposed ? product_by<T, true>(p, device) : product_by<T, false>(p, device);
}

// Each in a file of its own.
extern template std::string product_of<BFloat16>(const Product&, const Device&);
extern template std::string product_of<Float16>(const Product&, const Device&);

}  // namespace mft::cuda::sm80
