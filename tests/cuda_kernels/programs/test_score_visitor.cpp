// The epilogue visitor of score_grad_sm90, executed: all 256 threads of every tile, with the layouts that CUTLASS gives
// it, against the formula. Whether each element is made once, from the right weight, sign and old value.
#include "cuda_on_host.h"

#include <cutlass/epilogue/collective/collective_builder.hpp>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "score_epilogue_sm90.h"

using namespace mft::cuda;

// CUTLASS's host code has calls of these, which are not reached.
extern "C" {
cudaError_t CUDARTAPI cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
}

namespace {

int failures = 0;

// As score_grad_sm90.cuh builds it.
template <class T, class D>
struct Collective {
  using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, cute::Shape<cute::_2, cute::_1, cute::_1>,
      cute::Shape<cute::_128, cute::_32>, float, float, void, cutlass::layout::RowMajor, 16 / sizeof(D),
      CutlassType<D>, cutlass::layout::RowMajor, 16 / sizeof(D), cutlass::epilogue::TmaWarpSpecializedCooperative,
      ScoreEpilogue<T, D>>::CollectiveOp;
  using Product = decltype(cute::make_tiled_mma(
      cute::SM90_64x256x16_F32BF16BF16_SS<cute::GMMA::Major::MN, cute::GMMA::Major::MN>{},
      cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
};

float special_score(std::mt19937& random) {
  const float values[] = {0.0f, -0.0f, 1.5f, -2.0f, NAN, INFINITY, -INFINITY, 1e-7f, -1e-7f};
  return values[random() % 9];
}

// The matrices have just the elements they need: the last row has no padding.
template <class T, class D, class Score>
struct Problem {
  int n, k;
  int64_t weight_stride, d_scores_stride, score_stride;
  std::vector<T> weight;
  std::vector<D> d_scores;
  std::vector<Score> scores;
  std::vector<uint32_t> words;
  SignSource source;
  bool accumulate, weighted;

  Problem(int n, int k, int pad, SignSource source, bool accumulate, bool weighted)
      : n(n), k(k), weight_stride(k + pad), d_scores_stride(k + 2 * pad), score_stride(k + 3 * pad),
        weight((n - 1) * weight_stride + k), d_scores((n - 1) * d_scores_stride + k),
        scores((n - 1) * score_stride + k), words(static_cast<size_t>(n) * ((k + 31) / 32)), source(source),
        accumulate(accumulate), weighted(weighted) {
    std::mt19937 random(n + k + pad);
    const auto number = [&random](int exponent) {
      return std::ldexp(static_cast<float>(random() % 2001) - 1000, exponent);
    };
    for (T& e : weight) e = isa::round_to<T>(number(-9));
    for (D& e : d_scores) e = isa::round_to<D>(number(-7));
    for (Score& e : scores) e = isa::round_to<Score>(special_score(random));
    for (uint32_t& e : words) e = random();
  }

  template <class E>
  static constexpr Type type() {
    return std::is_same_v<E, float> ? Type::kFloat32 : std::is_same_v<E, BFloat16> ? Type::kBFloat16 : Type::kFloat16;
  }

  ScoreGrad asked() {
    ScoreGrad p;
    p.weight = {weighted ? weight.data() : nullptr, type<T>(), n, k, weight_stride};
    p.d_scores = {d_scores.data(), type<D>(), n, k, d_scores_stride};
    p.accumulate = accumulate;
    if (source == SignSource::kBits) p.sign.words = words.data();
    if (source == SignSource::kHalves || source == SignSource::kFloats) {
      p.sign.scores = {scores.data(), type<Score>(), n, k, score_stride};
    }
    return p;
  }

  static float sum(int row, int column) { return static_cast<float>((row * 131 + column * 17) % 257 - 128); }

  float expected(int row, int column) const {
    float sign = 1;
    if (source == SignSource::kBits) {
      sign = words[static_cast<size_t>(row) * ((k + 31) / 32) + column / 32] >> column % 32 & 1 ? 1 : -1;
    } else if (source != SignSource::kOne) {
      const float score = isa::widen(scores[row * score_stride + column]);
      sign = score > 0 ? 1 : score < 0 ? -1 : 0;
    }
    float value = sum(row, column) * (weighted ? isa::widen(weight[row * weight_stride + column]) : 1) * sign;
    if (accumulate) value += isa::widen(d_scores[row * d_scores_stride + column]);
    return isa::widen(isa::round_to<D>(value));
  }
};

// One thread's share of one tile, in the order of CUTLASS's store loop.
template <class T, class D, class Problem>
void run_thread(const Problem& problem, ScoreEpilogue<T, D>& visitor, int down, int right, int thread,
                std::vector<int>& seen) {
  using namespace cute;
  using Tile = typename Collective<T, D>::Tile;
  using Epilogue = typename Collective<T, D>::Epilogue;
  using Element = typename Epilogue::ElementD;
  typename Collective<T, D>::Product product;
  const auto tile = take<0, 2>(Tile{});
  auto sums = partition_fragment_C(product, tile);
  auto rows = make_tensor_like<int>(sums), columns = make_tensor_like<int>(sums);
  const auto places = product.get_slice(thread).partition_C(make_identity_tensor(tile));
  for (int i = 0; i < size(sums); ++i) {
    rows(i) = down * 128 + get<0>(places(i)), columns(i) = right * 256 + get<1>(places(i));
    sums(i) = Problem::sum(rows(i), columns(i));
  }
  const auto copy = make_tiled_copy_S(Copy_Atom<typename Epilogue::CopyOpR2S, Element>{},
                                      make_tiled_copy_C_atom(typename Epilogue::CopyAtomC{}, product));
  const auto mine = copy.get_slice(thread);
  auto sums_by_16 = recast<cutlass::Array<float, 16>>(mine.retile_S(sums));
  auto rows_by_16 = recast<cutlass::Array<int, 16>>(mine.retile_S(rows));
  auto columns_by_16 = recast<cutlass::Array<int, 16>>(mine.retile_S(columns));

  const auto whole = make_identity_tensor(make_shape(problem.n, problem.k));
  const auto of_tile = local_tile(whole, tile, make_coord(down, right));
  const auto of_thread = mine.partition_S(flat_divide(of_tile, typename Epilogue::EpilogueTile{}));
  const auto edge = make_coord(problem.n, problem.k);
  auto unused = make_tensor<Element>(Shape<_16>{});
  const auto args = cutlass::epilogue::fusion::detail::ConsumerStoreArgs(
      make_shape(problem.n, problem.k, 64, 1), Tile{}, make_coord(down, right, _, 0), product,
      typename Epilogue::EpilogueTile{}, copy, make_coord_tensor(of_tile.layout()), edge - of_tile(_0{}),
      make_coord_tensor(of_thread.layout()), edge - of_thread(_0{}), unused, thread);
  auto store = visitor.template get_consumer_store_callbacks<true>(args);
  store.begin();
  for (int subtile = 0; subtile < 8; ++subtile) {
    store.begin_loop(0, subtile);
    const auto result = store.visit(sums_by_16(_, 0, 0)(subtile), 0, 0, subtile);
    store.postreduce(0, subtile, 0, true);
    for (int i = 0; i < 16; ++i) {
      const int row = rows_by_16(_, 0, 0)(subtile)[i], column = columns_by_16(_, 0, 0)(subtile)[i];
      if (row >= problem.n || column >= problem.k) continue;
      ++seen[static_cast<size_t>(row) * problem.k + column];
      const float got = static_cast<float>(result[i]), expected = problem.expected(row, column);
      if (got != expected && ++failures < 10) {
        std::printf("(%d, %d) of (%d, %d): got %g, expected %g; source %d, %s weight, %s\n", row, column, problem.n,
                    problem.k, got, expected, static_cast<int>(problem.source), problem.weighted ? "by" : "no",
                    problem.accumulate ? "added" : "replaced");
      }
    }
  }
}

template <class T, class D, class Score>
void check(int n, int k, int pad, SignSource source, bool accumulate, bool weighted = true) {
  Problem<T, D, Score> problem(n, k, pad, source, accumulate, weighted);
  const auto params = ScoreEpilogue<T, D>::arguments_of(problem.asked());
  ScoreEpilogue<T, D> visitor(params, {});
  std::vector<int> seen(static_cast<size_t>(n) * k);
  for (int down = 0; down < (n + 127) / 128; ++down) {
    for (int right = 0; right < (k + 255) / 256; ++right) {
      for (int thread = 0; thread < 256; ++thread) run_thread<T, D>(problem, visitor, down, right, thread, seen);
    }
  }
  for (const int times : seen) {
    if (times != 1 && ++failures < 10) std::printf("an element is made %d times\n", times);
  }
}

template <class T, class D>
void check_all(int n, int k, int pad) {
  for (const bool accumulate : {false, true}) {
    check<T, D, float>(n, k, pad, SignSource::kOne, accumulate);
    check<T, D, float>(n, k, pad, SignSource::kOne, accumulate, false);
    check<T, D, float>(n, k, pad, SignSource::kBits, accumulate);
    check<T, D, float>(n, k, pad, SignSource::kFloats, accumulate);
    check<T, D, BFloat16>(n, k, pad, SignSource::kHalves, accumulate);
    check<T, D, Float16>(n, k, pad, SignSource::kHalves, accumulate);
  }
}

}  // namespace

int main() {
  for (const auto& [n, k, pad] : {std::tuple{8, 8, 0}, {136, 264, 8}, {72, 312, 16}}) {
    check_all<BFloat16, float>(n, k, pad);
    check_all<BFloat16, BFloat16>(n, k, pad);
    check_all<Float16, float>(n, k, pad);
    check_all<Float16, Float16>(n, k, pad);
  }
  if (failures != 0) std::printf("%d failures\n", failures);
  return failures != 0;
}
