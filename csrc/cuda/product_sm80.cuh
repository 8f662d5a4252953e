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
// Where tiles are too few for a GPU the depth is cut into parts of whole steps, a block each, which write fp32 sums into
// the workspace. A second kernel adds them in the order of the parts, whatever order they came in. product_sm80.cu has
// how many parts, and of which of the two tiles.
//
// A step of 32 depths takes a warp 32 mma.sync among 200 instructions with bf16 scores (SASS of nvcc 13.0), and 128
// registers allow two blocks a multiprocessor. How many stages let shared memory hold both, the launch asks the device:
// 128 tokens with bf16 scores take 3 in sm_80's 164 KiB and 2 in the 100 KiB of 8.6, 8.9 and 12.0. Speed: not measured.
#pragma once

#include <algorithm>
#include <type_traits>

#include "mask_sm80.h"

namespace mft::cuda::sm80 {

struct ProductArguments {
  View out, in, weight;
  KeepArguments keep;
  const char* bias;  // or null
  int tile_rows, tile_columns;
  int stages;
  float* parts;    // (parts, out.rows, part_stride), or null: the depth is in one
  int part_depth;  // of a part, whole steps
  int64_t part_stride;
};

template <class T>
MFT_DEVICE float bias_of(const char* bias, const View& out, int feature) {
  if (bias == nullptr || feature >= out.columns) return 0.0f;
  return isa::widen(load<T>(bias + 2 * static_cast<int64_t>(feature)));
}

// T: of in, weight and out. S: of the scores, or Words. kChunked: in, weight and scores are. kTokens: 128 or 64 a tile.
template <class T, class S, bool kMagnitude, bool kTransposed, bool kChunked, int kTokens>
struct ProductKernel {
  static constexpr int kThreads = sm80::kThreads;
  static constexpr int kBlocksPerMultiprocessor = kChunked ? 2 : 1;  // one: loads by elements need registers
  static constexpr bool kParts = kChunked;                           // the depth may be cut
  using Arguments = ProductArguments;

  using Mask = sm80::Mask<S, kMagnitude, kTransposed, kChunked>;
  using In = Tile<kTokens, kTileDepth, 2>;
  using Weight = WeightTile<kTransposed, 2>;
  using Out = Tile<kTokens, kTileFeatures, 2>;
  static constexpr int kStageBytes = In::kBytes + Weight::kBytes + Mask::kBytes;
  static_assert(kStageBytes % 128 == 0 && Out::kBytes <= 2 * kStageBytes);

  static constexpr int kWarpTokens = kTokens / 2;
  static constexpr int kDown = kWarpTokens / 16, kAcross = kWarpFeatures / 8;  // mma.sync's tiles in a warp's
  using Sums = float[kDown][kAcross][4];

  MFT_DEVICE static void run(const Arguments& a) {
    const Place place = place_of(a);
    const int first_feature = place.feature, warp_token = place.warp_token, warp_feature = place.warp_feature;
    char* const shared = isa::shared_memory();

    // One length for all three readers, so that one register counts what is left.
    const int depth = kParts ? static_cast<int>(isa::block(1)) * a.part_depth : 0, rest = a.in.columns - depth;
    const int length = kParts && a.part_depth < rest ? a.part_depth : rest;
    TileReader<In, false, kChunked, kThreads> in(a.in, place.token, depth, length);
    TileReader<Weight, kTransposed, kChunked, kThreads> weight(a.weight, kTransposed ? depth : first_feature,
                                                               kTransposed ? first_feature : depth, length);
    Mask mask(a.keep, first_feature, warp_feature, depth, length);
    const auto copy = [&](int stage) {
      char* const to = shared + stage * kStageBytes;
      in.copy(to);
      weight.copy(to + In::kBytes);
      mask.copy(to + In::kBytes + Weight::kBytes);
      isa::commit_copies();
    };

    Sums sums = {};
    // A loop for each number of stages: one loop for all takes a register more than 128, and spills.
    const auto sum = [&](auto number) {
      constexpr int kStages = decltype(number)::value;
      for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);
      for (int left = length, stage = 0, done = kStages - 1; left > 0; left -= kTileDepth) {
        isa::wait_copies<kStages - 2>();
        isa::sync_block();  // the tile has come for all, and all are done with the one before it, which is overwritten
        copy(done);  // behind the end zeros, which nobody reads
        multiply(sums, mask, shared + stage * kStageBytes, warp_token, warp_feature);
        done = stage;
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
    };
    if (a.stages == 4) {
      sum(std::integral_constant<int, 4>{});
    } else if (a.stages == 3) {
      sum(std::integral_constant<int, 3>{});
    } else {
      sum(std::integral_constant<int, 2>{});
    }
    isa::wait_copies<0>();
    const Place again = place_of(a);  // for registers are short in the loop
    if constexpr (kParts) {
      if (a.parts != nullptr) return write_part(a, sums, again);
    }
    isa::sync_block();
    write(a, sums, shared, again);
  }

 private:
  struct Place {
    int token, feature;            // the block's first
    int warp_token, warp_feature;  // the warp's, counted from there
  };

  // The compiler keeps nothing of what shuffle() and warp() gave.
  MFT_DEVICE static Place place_of(const Arguments& a) {
    const TilePlace tile = TilePlace::of(isa::shuffle(static_cast<int>(isa::block(0)), 0), a.tile_rows, a.tile_columns);
    return {tile.row * kTokens, tile.column * kTileFeatures, isa::warp() / 4 * kWarpTokens,
            isa::warp() % 4 * kWarpFeatures};
  }

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

  // Four lanes write a sector.
  MFT_DEVICE static void write_part(const Arguments& a, const Sums& sums, const Place& place) {
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

  // By way of shared memory, so that 16 bytes are written at once.
  MFT_DEVICE static void write(const Arguments& a, const Sums& sums, char* shared, const Place& place) {
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

inline bool is_chunked(const Product& p) {
  return view_of(p.in).chunked && view_of(p.weight).chunked && keep_arguments(p.keep, p.weight).scores.chunked;
}

template <class T, class S, bool kMagnitude, bool kTransposed>
std::string launch_product(const Product& p, const Plan& plan, const Device& device) {
  ProductArguments a = {};
  a.out = view_of(p.out), a.in = view_of(p.in), a.weight = view_of(p.weight);
  a.keep = keep_arguments(p.keep, p.weight);
  a.bias = static_cast<const char*>(p.bias);
  a.tile_columns = tiles_of(p.out.columns, kTileFeatures);
  a.part_stride = static_cast<int64_t>(a.tile_columns) * kTileFeatures;
  if (plan.parts > 1) a.parts = static_cast<float*>(p.workspace);
  a.part_depth = tiles_of(tiles_of(p.in.columns, kTileDepth), plan.parts) * kTileDepth;
  const auto start = [&](auto kernel) {
    using Kernel = decltype(kernel);
    a.tile_rows = tiles_of(p.out.rows, plan.tokens);
    LaunchShape shape;
    shape.x = static_cast<int64_t>(a.tile_rows) * a.tile_columns;
    shape.y = plan.parts;
    a.stages = stages_of(Kernel::kStageBytes, device);
    shape.shared_bytes = a.stages * Kernel::kStageBytes;
    if (shape.x > kLongestSide) return std::string("x has too many tokens, 2^31 tiles and more; split them");
    return isa::launch<Kernel>(shape, device.stream, a);
  };
  if (!is_chunked(p)) return start(ProductKernel<T, S, kMagnitude, kTransposed, false, 128>{});
  const std::string error = plan.tokens == 64 ? start(ProductKernel<T, S, kMagnitude, kTransposed, true, 64>{})
                                              : start(ProductKernel<T, S, kMagnitude, kTransposed, true, 128>{});
  return error.empty() && plan.parts > 1 ? sum_parts(p, plan.parts, a.part_stride, device) : error;
}

template <class T, class S, bool kTransposed>
std::string product_by_scores(const Product& p, const Plan& plan, const Device& device) {
  return p.keep.magnitude ? launch_product<T, S, true, kTransposed>(p, plan, device)
                          : launch_product<T, S, false, kTransposed>(p, plan, device);
}

template <class T, bool kTransposed>
std::string product_by(const Product& p, const Plan& plan, const Device& device) {
  if (p.keep.words != nullptr) return launch_product<T, Words, true, kTransposed>(p, plan, device);
  switch (p.keep.scores.type) {
    case Type::kFloat32:
      return product_by_scores<T, float, kTransposed>(p, plan, device);
    case Type::kBFloat16:
      return product_by_scores<T, BFloat16, kTransposed>(p, plan, device);
    default:
      return product_by_scores<T, Float16, kTransposed>(p, plan, device);
  }
}

template <class T>
std::string product_of(const Product& p, const Plan& plan, const Device& device) {
  return p.transposed ? product_by<T, true>(p, plan, device) : product_by<T, false>(p, plan, device);
}

// Each in a file of its own.
extern template std::string product_of<BFloat16>(const Product&, const Plan&, const Device&);
extern template std::string product_of<Float16>(const Product&, const Plan&, const Device&);

}  // namespace mft::cuda::sm80
