// The masked linear layer with a mask for each token. Tokens are sorted by mask. Then one pass over the weight serves
// them all, by dot products or by tiles, or each mask has a product of its own.
#include "many_linear.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "choice.h"
#include "few_linear.h"
#include "fused_linear.h"
#include "linear.h"
#include "parallel.h"
#include "scratch.h"

namespace mft {
namespace {

// Tokens in the order of their masks.
struct Order {
  const int64_t* tasks;
  int64_t each;
  std::vector<int64_t> places;

  Order(const int64_t* tasks, int64_t each, int64_t count) : tasks(tasks), each(each), places(count) {
    std::iota(places.begin(), places.end(), 0);
    std::stable_sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return task_of(a) < task_of(b); });
  }
  // Tokens first .. first + count of `all`.
  Order(const Order& all, int64_t first, int64_t count)
      : tasks(all.tasks), each(all.each), places(all.places.begin() + first, all.places.begin() + first + count) {}
  int64_t size() const { return static_cast<int64_t>(places.size()); }
  int64_t task_of(int64_t token) const { return tasks[token / each]; }
  // Calls f(task, first, end) for each task, with its range of this order.
  template <typename F>
  void for_tasks(const F& f) const {
    for (int64_t first = 0, end = 0; first < size(); first = end) {
      while (end < size() && task_of(places[end]) == task_of(places[first])) ++end;
      f(task_of(places[first]), first, end);
    }
  }
};

// Returns the mask of a task. `all` receives the words of one that keeps everything.
MaskSource mask_of(const std::vector<const uint32_t*>& masks, int64_t task, std::vector<uint32_t>& all, int64_t columns) {
  if (task < 0) return keep_all(all, columns);
  return {nullptr, Format::kFloat32, masks[task], {0, 0, false}, columns};
}

void by_dots(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
                 const std::vector<const uint32_t*>& masks, const Order& order, const void* bias) {
  std::vector<uint32_t> all;
  const int64_t stride = few_token_stride(weight.columns), bytes = weight.rows * weight.columns * bytes_of(weight.format);
  const Scratch memory(order.size() * stride * sizeof(float));
  auto* tokens = static_cast<float*>(memory.get());
  for (int64_t t = 0; t < order.size(); ++t) {
    cpu.few->prepare_dot(tokens + t * stride, x.row(order.places[t]), x.format, x.columns);
  }
  std::vector<FewTokens> calls;
  order.for_tasks([&](int64_t task, int64_t first, int64_t end) {
    const MaskSource mask = mask_of(masks, task, all, weight.columns);
    calls.push_back(few_tokens(y, weight, mask, bias, tokens + first * stride, end - first));
    calls.back().places = order.places.data() + first;
  });
  for_few_spans({0, weight.rows}, kDotRows, few_work(bytes, order.size()), [&](int64_t first, int64_t end) {
    cpu.few->dot_many(calls.data(), static_cast<int64_t>(calls.size()), first, end);
  });
}

// Calls copy(token, its place in the order) for all tokens.
template <typename Copy>
void for_places(const Order& order, int64_t bytes, const Copy& copy) {
  parallel_for(0, order.size(), 1 + (256 << 10) / (bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) copy(order.places[t], t);
  });
}

// Calls multiply(out, in) with the tokens in their order, and scatters `out` to y. Nothing is copied if they already
// lie in order.
template <typename Multiply>
void gathered(const Matrix& y, const Matrix& x, const Order& order, const Multiply& multiply) {
  const int64_t first = order.places.front();
  if (order.places.back() - first == order.size() - 1 && std::is_sorted(order.places.begin(), order.places.end())) {
    return multiply(y.narrow_rows(first, order.size()), x.narrow_rows(first, order.size()));
  }
  const int64_t from = x.columns * bytes_of(x.format), to = y.columns * bytes_of(y.format);
  const Scratch in_memory(order.size() * from), out_memory(order.size() * to);
  const Matrix in{in_memory.get(), x.format, order.size(), x.columns, x.columns};
  const Matrix out{out_memory.get(), y.format, order.size(), y.columns, y.columns};
  for_places(order, from, [&](int64_t token, int64_t place) { std::memcpy(in.row(place), x.row(token), from); });
  multiply(out, in);
  for_places(order, to, [&](int64_t token, int64_t place) { std::memcpy(y.row(token), out.row(place), to); });
}

void by_mask(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
             const std::vector<const uint32_t*>& masks, const Order& order, const void* bias) {
  gathered(y, x, order, [&](const Matrix& out, const Matrix& in) {
    std::vector<uint32_t> all;
    order.for_tasks([&](int64_t task, int64_t first, int64_t end) {
      masked_linear(cpu, out.narrow_rows(first, end - first), in.narrow_rows(first, end - first), weight,
                    mask_of(masks, task, all, weight.columns), bias);
    });
  });
}

void by_tiles(const Gemm& gemm, const Matrix& y, const Matrix& x, const Matrix& weight,
              const std::vector<const uint32_t*>& masks, const Order& order, const void* bias) {
  gathered(y, x, order, [&](const Matrix& out, const Matrix& in) {
    std::vector<uint32_t> all;
    std::vector<Run> runs;
    order.for_tasks([&](int64_t task, int64_t first, int64_t end) {
      runs.push_back({mask_of(masks, task, all, weight.columns), first, end});
    });
    fused_few_linear(gemm, out, in, weight, runs, bias);
  });
}

// Returns the GEMM that multiplies by tiles, or nullptr.
const Gemm* tiles_of(const Capability& cpu, Format format) {
  const Gemm* gemm = cpu.gemms[static_cast<int>(format)];
  return gemm != nullptr && gemm->multiply_far_rows != nullptr ? gemm : nullptr;
}

// Returns the fastest way for the `used` masks. Dot products are, as long as a product per mask, with the average number
// of tokens, would take the path for few tokens and read the weight once too.
ManyWay way_of(const Capability& cpu, const Matrix& x, const Matrix& weight, int64_t used) {
  if (used == 1) return ManyWay::kByMask;
  const int64_t average = (x.rows + used - 1) / used;
  if (average >= 4 && average < 64 && tiles_of(cpu, weight.format) != nullptr) return ManyWay::kTiles;
  std::vector<uint32_t> all;
  const Call alone = call_of(Product::kForward, weight, keep_all(all, weight.columns), average);
  return choose(cpu.name, alone, Path::kAuto) == Path::kFew ? ManyWay::kDots : ManyWay::kByMask;
}

}  // namespace

void many_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
                        const std::vector<const uint32_t*>& masks, const int64_t* tasks, int64_t each, const void* bias,
                        ManyWay way) {
  const Order order(tasks, each, x.rows);
  if (way == ManyWay::kAuto) {
    int64_t used = 0;
    order.for_tasks([&](int64_t, int64_t, int64_t) { ++used; });
    way = way_of(cpu, x, weight, used);
  }
  if (way == ManyWay::kByMask) return by_mask(cpu, y, x, weight, masks, order, bias);
  const Gemm* tiles = way == ManyWay::kTiles ? tiles_of(cpu, weight.format) : nullptr;
  if (way == ManyWay::kTiles && tiles == nullptr) {
    throw std::invalid_argument(std::string("way must not be 'tiles' with ") + cpu.name + " and this dtype, which have none");
  }
  const int64_t most = tiles != nullptr ? kMostFarTokens : kFewTokens, turns = (x.rows + most - 1) / most;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t first = x.rows * turn / turns;
    const Order part(order, first, x.rows * (turn + 1) / turns - first);
    tiles != nullptr ? by_tiles(*tiles, y, x, weight, masks, part, bias) : by_dots(cpu, y, x, weight, masks, part, bias);
  }
}

}  // namespace mft
