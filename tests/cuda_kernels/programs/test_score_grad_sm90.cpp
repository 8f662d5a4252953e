// Execute CUTLASS's d_scores kernel for Hopper as score_grad_sm90.cuh builds it, and compare it with the formula bit
// for bit: all threads of both blocks of a cluster, from the host code's description of tensors to the last TMA store.
// The mainloop, pipelines, scheduler, the epilogue's loop over subtiles, our visitor and our load warp are the device's
// own code. Single instructions are emulated (emulator/cutlass_sm90.h).
//
// Inputs end at a forbidden page. Outputs lie among elements that must not change, and are NaN unless they are added
// to.
#include "emulator/cutlass_sm90.h"

#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "score_grad_sm90.cuh"

using namespace mft::cuda;

// CUTLASS's host code refers to these functions, but does not reach the calls.
extern "C" {
cudaError_t CUDARTAPI cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
cudaError_t CUDARTAPI cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
}

namespace {

int failures = 0;
unsigned launches = 0;

template <class E>
constexpr Type type_of() {
  return std::is_same_v<E, float> ? Type::kFloat32 : std::is_same_v<E, BFloat16> ? Type::kBFloat16 : Type::kFloat16;
}

// A matrix whose last row ends right before a forbidden page.
template <class E>
struct Elements {
  int rows, columns;
  int64_t stride;
  char* pages;
  size_t bytes;
  E* data;

  Elements(int rows, int columns, int pad) : rows(rows), columns(columns), stride(columns + pad) {
    constexpr size_t kPage = 4096;
    const size_t used = ((rows - 1) * stride + columns) * sizeof(E);
    bytes = (used + kPage - 1) / kPage * kPage + kPage;
    pages = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(pages + bytes - kPage, kPage, PROT_NONE);
    data = reinterpret_cast<E*>(pages + bytes - kPage - used);
  }
  Elements(const Elements&) = delete;
  ~Elements() { munmap(pages, bytes); }

  size_t count() const { return (rows - 1) * stride + columns; }
  E& at(int row, int column) const { return data[row * stride + column]; }
  Matrix matrix() const { return {data, type_of<E>(), rows, columns, stride}; }
};

struct Shape {
  int m, n, k, pad;
};

// A way to compute d_scores.
struct Way {
  SignSource source;
  bool accumulate, weighted;
};

template <class T, class D, class Score>
struct Problem {
  Shape shape;
  Way way;
  Elements<T> grad_output, x, weight;
  Elements<D> d_scores;
  Elements<Score> scores;
  Elements<uint32_t> words;
  std::vector<D> before;

  Problem(Shape s, Way way)
      : shape(s), way(way), grad_output(s.m, s.n, s.pad), x(s.m, s.k, s.pad), weight(s.n, s.k, s.pad),
        d_scores(s.n, s.k, 2 * s.pad), scores(s.n, s.k, 3 * s.pad), words(s.n, (s.k + 31) / 32, 0) {
    std::mt19937 random(s.n + s.k + s.pad);
    const auto fill = [&random](const auto& elements, int range, int exponent) {
      using E = std::remove_reference_t<decltype(*elements.data)>;
      for (size_t i = 0; i < elements.count(); ++i) {
        const int number = static_cast<int>(random() % (2 * range + 1)) - range;
        elements.data[i] = isa::round_to<E>(std::ldexp(static_cast<float>(number), exponent));
      }
    };
    fill(grad_output, 3, 0), fill(x, 3, 0), fill(weight, 100, -6), fill(d_scores, 100, -3);
    const float special[] = {0.0f, -0.0f, 1.5f, -2.0f, NAN, INFINITY, -INFINITY, 1e-7f, -1e-7f};
    for (size_t i = 0; i < scores.count(); ++i) scores.data[i] = isa::round_to<Score>(special[random() % 9]);
    for (size_t i = 0; i < words.count(); ++i) words.data[i] = random();
    if (!way.accumulate) {
      for (int r = 0; r < s.n; ++r) {
        for (int c = 0; c < s.k; ++c) d_scores.at(r, c) = isa::round_to<D>(NAN);
      }
    }
    before.assign(d_scores.data, d_scores.data + d_scores.count());
  }

  ScoreGrad asked() const {
    ScoreGrad p;
    p.grad_output = grad_output.matrix(), p.x = x.matrix(), p.weight = weight.matrix(), p.d_scores = d_scores.matrix();
    if (!way.weighted) p.weight.data = nullptr;
    p.accumulate = way.accumulate;
    if (way.source == SignSource::kBits) p.sign.words = words.data;
    if (way.source == SignSource::kHalves || way.source == SignSource::kFloats) p.sign.scores = scores.matrix();
    return p;
  }

  D expected(int row, int column) const {
    float sign = 1, g = 0;
    if (way.source == SignSource::kBits) {
      sign = words.at(row, column / 32) >> column % 32 & 1 ? 1 : -1;
    } else if (way.source != SignSource::kOne) {
      const float score = isa::widen(scores.at(row, column));
      sign = score > 0 ? 1 : score < 0 ? -1 : 0;
    }
    for (int t = 0; t < shape.m; ++t) g += isa::widen(grad_output.at(t, row)) * isa::widen(x.at(t, column));
    const float value = g * (way.weighted ? isa::widen(weight.at(row, column)) : 1) * sign;
    const float old = way.accumulate ? isa::widen(before[row * d_scores.stride + column]) : -0.0f;
    return isa::round_to<D>(value + old);
  }

  void compare(const std::string& fault) const {
    int wrong = fault.empty() ? 0 : 1;
    std::string first = fault;
    for (int row = 0; row < shape.n; ++row) {
      for (int column = 0; column < d_scores.stride && row * d_scores.stride + column < int64_t(d_scores.count()); ++column) {
        const bool inside = column < shape.k;
        const D right = inside ? expected(row, column) : before[row * d_scores.stride + column];
        const D& got = d_scores.at(row, column);
        if (std::memcmp(&got, &right, sizeof got) == 0 || wrong++ != 0) continue;
        first = "(" + std::to_string(row) + ", " + std::to_string(column) + ") is " + std::to_string(isa::widen(got)) +
                ", not " + std::to_string(isa::widen(right));
      }
    }
    failures += wrong;
    if (wrong == 0) return;
    std::printf("%d tokens, weight (%d, %d), d_scores of %d bytes, source %d, %s weight, %s, launch %u: %d wrong, %s\n",
                shape.m, shape.n, shape.k, static_cast<int>(sizeof(D)), static_cast<int>(way.source),
                way.weighted ? "by" : "no", way.accumulate ? "added" : "replaced", launches, wrong, first.c_str());
  }
};

// With two multiprocessors, one cluster takes all tiles, one after the other.
template <class T, class D, class Score>
void check(Shape shape, Way way) {
  using Kernel = typename ScoreGradSm90<T, D>::Kernel;
  const Problem<T, D, Score> problem(shape, way);
  Device device;
  device.multiprocessors = 2;
  const auto arguments = ScoreGradSm90<T, D>::arguments_of(problem.asked(), device);
  const auto params = Kernel::to_underlying_arguments(arguments, nullptr);
  const dim3 grid = Kernel::get_grid_shape(params);
  emulator::Launch launch{{grid.x, grid.y, grid.z},
                          2,
                          static_cast<int>(Kernel::MaxThreadsPerBlock),
                          Kernel::SharedStorageSize,
                          [&params] { Kernel()(params, isa::shared_memory()); }};
  emulator::Settings settings;
  settings.seed = ++launches;
  settings.asynchrony = static_cast<emulator::Asynchrony>(launches % 3);
  settings.schedule = static_cast<emulator::Schedule>(launches % 2);
  problem.compare(emulator::run(launch, settings));
}

template <class T, class D>
void check_all() {
  constexpr Shape kTails{100, 136, 264, 8};  // two steps of tokens; two tiles per block, with tails on both sides
  for (const bool accumulate : {false, true}) {
    check<T, D, float>(kTails, {SignSource::kOne, accumulate, true});
    check<T, D, float>(kTails, {SignSource::kOne, accumulate, false});
    check<T, D, float>(kTails, {SignSource::kBits, accumulate, true});
    check<T, D, float>(kTails, {SignSource::kFloats, accumulate, true});
    check<T, D, BFloat16>(kTails, {SignSource::kHalves, accumulate, true});
    check<T, D, Float16>(kTails, {SignSource::kHalves, accumulate, true});
  }
  check<T, D, float>({8, 8, 8, 0}, {SignSource::kBits, true, true});  // the cluster's second block has no rows
  check<T, D, T>({330, 264, 520, 16}, {SignSource::kHalves, true, true});  // six tiles per block, of six steps
}

}  // namespace

int main() {
  // Each type of weight and each type of d_scores that the code distinguishes; g++ takes 6 s per kernel.
  check_all<BFloat16, float>();
  check_all<Float16, Float16>();
  if (failures != 0) std::printf("%d failures\n", failures);
  return failures != 0;
}
