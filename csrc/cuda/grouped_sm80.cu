// grouped_product and grouped_score_grad: what no kernel takes, which tile a product uses, and the kernels of d_scores.
//
// G[e] = grad_output.T @ x over the rows of expert e, with one block per expert and tile of 128 x 128, as in
// score_grad_sm80.cuh. A block looks up its rows in the offsets. For an expert without rows it writes zeros, or returns
// at once if d_scores are accumulated.
#include "grouped_sm80.cuh"

#include <algorithm>

#include "score_grad_sm80.cuh"
#include "tile_cost.h"

namespace mft::cuda {
namespace {

constexpr int kTile = 128;
constexpr int64_t kMostExperts = 65535;  // blocks along y

struct GroupedScoreGradArguments {
  sm80::ScoreGradArguments of;  // grad_output and x: of all rows; the others: the first expert's
  sm80::Groups groups;
  int64_t d_scores_bytes, weight_bytes, score_bytes, words;  // from one expert to the next

  MFT_DEVICE sm80::ScoreGradArguments arguments(int64_t expert, const sm80::GroupRows& rows) const {
    sm80::ScoreGradArguments a = of;
    a.grad_output.data += rows.first * a.grad_output.row_bytes;
    a.x.data += rows.first * a.x.row_bytes;
    a.grad_output.rows = a.x.rows = rows.rows;
    a.d_scores.data += expert * d_scores_bytes;
    if (a.weight.data != nullptr) a.weight.data += expert * weight_bytes;
    if (a.sign_scores.data != nullptr) a.sign_scores.data += expert * score_bytes;
    if (a.sign_words != nullptr) a.sign_words += expert * words;
    a.d_weight.data = nullptr;
    a.parts = nullptr;
    return a;
  }
};

template <class T, bool kChunked>
struct GroupedScoreGradKernel {
  using OneSum = sm80::ScoreGradKernel<T, kChunked>;
  using Arguments = GroupedScoreGradArguments;
  static constexpr int kThreads = OneSum::kThreads;
  static constexpr int kBlocksPerMultiprocessor = OneSum::kBlocksPerMultiprocessor;

  MFT_DEVICE static void run(const Arguments& g) {
    const auto place = sm80::TilePlace::of(static_cast<int>(isa::block(0)), g.of.tile_rows, g.of.tile_columns);
    const int expert = static_cast<int>(isa::block(1));
    const auto rows = sm80::GroupRows::of(g.groups, expert);
    const sm80::ScoreGradArguments a = g.arguments(expert, rows);
    if (rows.rows > 0) {
      const int tiles = (rows.rows + OneSum::kTileDepth - 1) / OneSum::kTileDepth;
      OneSum::run(a, place.row * kTile, place.column * kTile, 0, tiles);
    } else if (!a.accumulate) {
      clear(a, place.row * kTile, place.column * kTile);
    }
  }

 private:
  MFT_DEVICE static void clear(const sm80::ScoreGradArguments& a, int first_row, int first_column) {
    for (int at = isa::thread(); at < kTile * kTile / 8; at += kThreads) {
      const int row = first_row + at / (kTile / 8), column = first_column + at % (kTile / 8) * 8;
      if (row >= a.weight.rows || column >= a.weight.columns) continue;
      const float zeros[8] = {};
      sm80::Eight::write(a.d_scores, row, column, zeros);
    }
  }
};

// Return why the kernels do not take a weight of this type or these sizes, or "". They count in 32 bits.
std::string refusal_of(const Matrix& weight, int64_t rows, int64_t experts) {
  if (weight.type == Type::kFloat32) return "weight must be bf16 or fp16, got fp32; use the triton backend";
  if (std::max({rows, weight.rows, weight.columns}) > sm80::kLongestSide) {
    return "x and weight must have sides below 2^31 - 2^16; split them";
  }
  if (experts > kMostExperts) return "weight must have at most 65,535 experts; use the triton backend";
  return "";
}

template <class T>
std::string start(GroupedScoreGradArguments a, const Device& device) {
  const auto launch = [&](auto kernel) {
    using Kernel = decltype(kernel);
    constexpr int kStageBytes = Kernel::OneSum::kStageBytes;
    a.of.stages = std::clamp(sm80::stages_of(kStageBytes, device), 3, Kernel::OneSum::kMostStages);
    LaunchShape shape;
    shape.x = static_cast<int64_t>(a.of.tile_rows) * a.of.tile_columns;
    shape.y = a.groups.experts;
    shape.shared_bytes = a.of.stages * kStageBytes;
    if (shape.x > sm80::kLongestSide) return std::string("weight has too many elements, 2^31 tiles of 128 x 128");
    return isa::launch<Kernel>(shape, device.stream, a);
  };
  return a.of.grad_output.chunked && a.of.x.chunked ? launch(GroupedScoreGradKernel<T, true>{})
                                                    : launch(GroupedScoreGradKernel<T, false>{});
}

// Return the view of the first expert. It is chunked only if the rows of all experts are aligned.
sm80::View view_of_experts(const Matrix& m, int64_t stride, int64_t experts) {
  sm80::View view = sm80::view_of(m);
  view.chunked = view.chunked && (experts == 1 || stride * bytes_of(m.type) % sm80::kChunkBytes == 0);
  return view;
}

}  // namespace

// A tile of 128 rows reads a weight half as often. But if experts have no more than 64 rows each, half of the tile
// would be empty. The host knows only the total number of rows and assumes that all experts have equally many.
int grouped_tokens(const GroupedProduct& g) { return g.of.out.rows <= 64 * g.experts ? 64 : 128; }

// The same model as in product_sm80.cu.
Plan plan_sm80(const GroupedProduct& g, const Device& device) {
  const Product& p = g.of;
  const int tokens = grouped_tokens(g);
  const double mask = p.keep.words != nullptr ? 1.0 / 8 : bytes_of(p.keep.scores.type);
  Jobs jobs;
  jobs.count = quotient(p.out.columns, sm80::kTileFeatures) * usual_tiles(g, tokens);
  jobs.steps = quotient(p.in.columns, sm80::kTileDepth);
  jobs.multiply_adds = sm80::kTileFeatures * tokens * sm80::kTileDepth;
  jobs.read = sm80::kTileDepth * (2 * tokens + sm80::kTileFeatures * (2 + mask));
  jobs.written = 2 * sm80::kTileFeatures * tokens;
  const int stages = sm80::stages_of(static_cast<int>(jobs.read), device);
  const Rates rates = rates_of(device.capability);
  const double busy = busy_cycles(jobs, device.multiprocessors, 2, stages, rates.multiply_adds, rates.l2);
  return {launch_cycles(busy, bytes_of(g), device), tokens, 1, 0};
}

bool reads_scores(const GroupedProduct& g) {
  const Type type = g.of.keep.scores.type;
  return (type == Type::kFloat32 || type == g.of.weight.type) && sm80::is_chunked(g);
}

std::string grouped_product(const GroupedProduct& g, const Device& device) {
  const Product& p = g.of;
  const std::string error = refusal_of(p.weight, p.out.rows, g.experts);
  if (!error.empty() || p.out.rows == 0 || p.out.columns == 0) return error;
  if (p.keep.words == nullptr && !reads_scores(g)) return "scores like these must be packed first";
  // With fewer rows per expert on average, most of Hopper's tiles would be empty.
  constexpr int64_t kFewestOnAverage = 128;
  if (device.capability == 90 && p.out.rows >= kFewestOnAverage * g.experts && refusal_sm90(g).empty() &&
      plan_sm90(g, device).cycles <= plan_sm80(g, device).cycles) {
    return product_sm90(g, device);
  }
  const int tokens = grouped_tokens(g);
  return p.weight.type == Type::kBFloat16 ? sm80::grouped_of<BFloat16>(g, tokens, device)
                                          : sm80::grouped_of<Float16>(g, tokens, device);
}

std::string grouped_score_grad(const GroupedScoreGrad& g, const Device& device) {
  const ScoreGrad& p = g.of;
  const std::string error = refusal_of(p.weight, p.x.rows, g.experts);
  if (!error.empty() || p.weight.rows == 0 || p.weight.columns == 0 || g.experts == 0) return error;
  const int64_t elements = p.weight.rows * p.weight.columns;
  GroupedScoreGradArguments a = {};
  a.of.d_scores = view_of_experts(p.d_scores, elements, g.experts);
  a.of.grad_output = sm80::view_of(p.grad_output), a.of.x = sm80::view_of(p.x);
  a.of.weight = view_of_experts(p.weight, g.weight_stride, g.experts);
  a.of.sign_scores = view_of_experts(p.sign.scores, g.score_stride, g.experts), a.of.sign_words = p.sign.words;
  a.of.accumulate = p.accumulate;
  a.of.row_words = sm80::tiles_of(p.weight.columns, 32);
  a.of.tile_rows = sm80::tiles_of(p.weight.rows, kTile), a.of.tile_columns = sm80::tiles_of(p.weight.columns, kTile);
  a.groups = {g.offsets, static_cast<int>(g.experts), static_cast<int>(p.x.rows)};
  a.d_scores_bytes = elements * bytes_of(p.d_scores.type);
  a.weight_bytes = g.weight_stride * bytes_of(p.weight.type);
  a.score_bytes = g.score_stride * bytes_of(p.sign.scores.type);
  a.words = p.weight.rows * a.of.row_words;
  return p.weight.type == Type::kBFloat16 ? start<BFloat16>(a, device) : start<Float16>(a, device);
}

}  // namespace mft::cuda
