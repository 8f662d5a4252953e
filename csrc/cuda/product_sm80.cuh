// out = in @ where(keep, weight, 0).T + bias, and with the weight transposed (d_x), by mma.sync: for any GPU from sm_80
// on, any alignment and any stride.
//
//            depth        out (tokens, features): one block per tile, 8 warps of 2 x 4, 32 features each
//          +-------+
//   tokens |  in   |      in and weight, and with it scores or words, stream through shared memory in 2 to 4 stages of
//          +-------+      32 depths (cp.async). ldmatrix gives a warp the fragments; those of the weight are masked in
//          +-------+      registers, by each of the two warps that need them.
//   features weight|
//          +-------+      depth is K; transposed, it is N, and the weight's tile has depths as rows (ldmatrix.trans).
//
// If there are too few tiles for a GPU, the depth is cut into parts of whole steps. Each part is a block, which writes
// fp32 sums into the workspace. A second kernel adds them in the order of the parts, whatever order they came in.
// product_sm80.cu chooses the number of parts and which of the two tiles they have.
//
// In a step of 32 depths with bf16 scores, a warp executes 200 instructions, of which 32 are mma.sync (SASS of nvcc
// 13.0). 128 registers allow two blocks per multiprocessor. The launch asks the device how many stages let shared
// memory hold both. 128 tokens with bf16 scores take 3 stages in sm_80's 164 KiB, and 2 in the 100 KiB of 8.6, 8.9 and
// 12.0. Speed: not measured.
#pragma once

#include <algorithm>
#include <type_traits>

#include "mask_sm80.h"
#include "tile_sums_sm80.h"

namespace mft::cuda::sm80 {

struct ProductArguments {
  View out, in, weight;
  KeepArguments keep;
  const char* bias;  // or null
  int tile_rows, tile_columns;
  int stages;
  float* parts;    // (parts, out.rows, part_stride); null: the depth is one part
  int part_depth;  // of a part, whole steps
  int64_t part_stride;
};

template <class T>
MFT_DEVICE float bias_of(const char* bias, const View& out, int feature) {
  if (bias == nullptr || feature >= out.columns) return 0.0f;
  return isa::widen(load<T>(bias + 2 * static_cast<int64_t>(feature)));
}

struct ProductPlace {
  int token, feature;            // the block's first
  int warp_token, warp_feature;  // the warp's first, counted from there
};

// T: of in, weight and out. S: of the scores, or Words. kChunked: in, weight and scores are chunked. kTokens: 128 or 64
// per tile.
template <class T, class S, bool kMagnitude, bool kTransposed, bool kChunked, int kTokens>
struct ProductKernel {
  static constexpr int kThreads = sm80::kThreads;
  static constexpr int kBlocksPerMultiprocessor = kChunked ? 2 : 1;  // one: loads by elements need registers
  static constexpr bool kParts = kChunked;                           // the depth may be cut
  using Arguments = ProductArguments;

  using Mask = sm80::Mask<S, kMagnitude, kTransposed, kChunked>;
  using In = Tile<kTokens, kTileDepth, 2>;
  using Weight = WeightTile<kTransposed, 2>;
  using Result = TileSums<T, kTokens>;
  using Out = Tile<kTokens, kTileFeatures, 2>;
  static constexpr int kStageBytes = In::kBytes + Weight::kBytes + Mask::kBytes;
  static_assert(kStageBytes % 128 == 0 && Out::kBytes <= 2 * kStageBytes);
  static_assert(Result::kWarpColumns == kWarpFeatures);

  MFT_DEVICE static void run(const Arguments& a) {
    char* const shared = isa::shared_memory();
    typename Result::Sums sums = {};
    add_up(a, place_of(a), shared, sums);
    const ProductPlace again = place_of(a);  // because registers are short in the loop
    if constexpr (kParts) {
      if (a.parts != nullptr) {
        return Result::write_part(sums, a.parts, a.out.rows, a.part_stride, again.token + again.warp_token,
                                  again.feature + again.warp_feature);
      }
    }
    isa::sync_block();
    write(a, sums, shared, again);
  }

  // The compiler does not keep the results of shuffle() and warp() in registers between calls.
  MFT_DEVICE static ProductPlace place_of(const Arguments& a) {
    const TilePlace tile = TilePlace::of(isa::shuffle(static_cast<int>(isa::block(0)), 0), a.tile_rows, a.tile_columns);
    return {tile.row * kTokens, tile.column * kTileFeatures, Result::warp_row(), Result::warp_column()};
  }

  // Compute the sums of a tile, by all threads of the block.
  MFT_DEVICE static void add_up(const Arguments& a, const ProductPlace& place, char* shared,
                                typename Result::Sums& sums) {
    const int first_feature = place.feature, warp_token = place.warp_token, warp_feature = place.warp_feature;

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

    // One loop per number of stages: a single loop for all needs one register more than 128, and spills.
    const auto sum = [&](auto number) {
      constexpr int kStages = decltype(number)::value;
      for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);
      for (int left = length, stage = 0, done = kStages - 1; left > 0; left -= kTileDepth) {
        isa::wait_copies<kStages - 2>();
        isa::sync_block();  // all warps have the tile, and are done with the one before, which is overwritten
        copy(done);  // behind the end: zeros, which nobody reads
        const char* const tiles = shared + stage * kStageBytes;
        Result::template multiply<In, false, Weight, kTransposed, kTileDepth>(
            sums, tiles, tiles + In::kBytes, warp_token, warp_feature, [&](auto& weights, int column, int depth) {
              mask.select(weights, tiles + In::kBytes + Weight::kBytes, column, depth);
            });
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
  }

  // Write through shared memory, so that 16 bytes are written at once.
  MFT_DEVICE static void write(const Arguments& a, const typename Result::Sums& sums, char* shared,
                               const ProductPlace& place) {
    const int first_token = place.token, first_feature = place.feature;
    const int g = isa::lane() / 4, c = isa::lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < Result::kAcross; ++j) {
      const int feature = place.warp_feature + 8 * j + c;
      const float low = bias_of<T>(a.bias, a.out, first_feature + feature);
      const float high = bias_of<T>(a.bias, a.out, first_feature + feature + 1);
#pragma unroll
      for (int i = 0; i < Result::kDown; ++i) {
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

// Return all arguments but tile_rows and stages.
inline ProductArguments product_arguments(const Product& p, const Plan& plan) {
  ProductArguments a = {};
  a.out = view_of(p.out), a.in = view_of(p.in), a.weight = view_of(p.weight);
  a.keep = keep_arguments(p.keep, p.weight);
  a.bias = static_cast<const char*>(p.bias);
  a.tile_columns = tiles_of(p.out.columns, kTileFeatures);
  a.part_stride = static_cast<int64_t>(a.tile_columns) * kTileFeatures;
  if (plan.parts > 1) a.parts = static_cast<float*>(p.workspace);
  a.part_depth = tiles_of(tiles_of(p.in.columns, kTileDepth), plan.parts) * kTileDepth;
  return a;
}

inline bool is_chunked(const Product& p) {
  return view_of(p.in).chunked && view_of(p.weight).chunked && keep_arguments(p.keep, p.weight).scores.chunked;
}

template <class T, class S, bool kMagnitude, bool kTransposed>
std::string launch_product(const Product& p, const Plan& plan, const Device& device) {
  auto a = product_arguments(p, plan);
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

// Each is instantiated in a file of its own.
extern template std::string product_of<BFloat16>(const Product&, const Plan&, const Device&);
extern template std::string product_of<Float16>(const Product&, const Plan&, const Device&);

}  // namespace mft::cuda::sm80
