// The masked linear layer with a mask for each token. Few tokens are sorted by mask and prepared once; then threads
// share the rows of the weight. More tokens go in turns. Many tokens are gathered by mask, multiplied one mask at a
// time, and scattered back.
#include "many_linear.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "choice.h"
#include "few_linear.h"
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

  Order(const int64_t* tasks, int64_t each, int64_t first, int64_t count) : tasks(tasks), each(each), places(count) {
    std::iota(places.begin(), places.end(), first);
    std::stable_sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return task_of(a) < task_of(b); });
  }
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

void in_one_pass(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
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

void by_mask(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
             const std::vector<const uint32_t*>& masks, const Order& order, const void* bias) {
  std::vector<uint32_t> all;
  const auto multiply = [&](const Matrix& out, const Matrix& in, int64_t task) {
    masked_linear(cpu, out, in, weight, mask_of(masks, task, all, weight.columns), bias);
  };
  if (order.task_of(order.places.front()) == order.task_of(order.places.back())) {
    return multiply(y, x, order.task_of(0));
  }
  const int64_t from = x.columns * bytes_of(x.format), to = y.columns * bytes_of(y.format);
  const Scratch in_memory(x.rows * from), out_memory(y.rows * to);
  const Matrix in{in_memory.get(), x.format, x.rows, x.columns, x.columns};
  const Matrix out{out_memory.get(), y.format, y.rows, y.columns, y.columns};
  for_places(order, from, [&](int64_t token, int64_t place) { std::memcpy(in.row(place), x.row(token), from); });
  order.for_tasks([&](int64_t task, int64_t first, int64_t end) {
    multiply(out.narrow_rows(first, end - first), in.narrow_rows(first, end - first), task);
  });
  for_places(order, to, [&](int64_t token, int64_t place) { std::memcpy(y.row(token), out.row(place), to); });
}

// Whether one pass is faster than a product for each of the `used` masks. It is, as long as such a product, with the
// average number of tokens, would take the path for few tokens and read the weight once too. SmolLM2's linears, time of
// one pass relative to one product per mask (Xeon with AMX):
//
//   bf16, 3 masks: 12 rows 0.92, 24 rows 0.92, 48 rows 1.16
//   bf16, 8 masks: 64 rows 0.86
//   fp32, 3 masks: 128 rows 0.91
bool is_one_pass(const Capability& cpu, const Matrix& x, const Matrix& weight, int64_t used) {
  std::vector<uint32_t> all;
  const Call alone = call_of(Product::kForward, weight, keep_all(all, weight.columns), (x.rows + used - 1) / used);
  return used > 1 && choose(cpu.name, alone, Path::kAuto) == Path::kFew;
}

}  // namespace

void many_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
                        const std::vector<const uint32_t*>& masks, const int64_t* tasks, int64_t each, const void* bias,
                        bool once) {
  std::vector<bool> used(masks.size() + 1);
  for (int64_t i = 0; i < x.rows / each; ++i) used[tasks[i] + 1] = true;
  if (!once && !is_one_pass(cpu, x, weight, std::count(used.begin(), used.end(), true))) {
    return by_mask(cpu, y, x, weight, masks, Order(tasks, each, 0, x.rows), bias);
  }
  for (int64_t turn = 0; turn < x.rows; turn += kFewTokens) {
    const Order order(tasks, each, turn, std::min(kFewTokens, x.rows - turn));
    in_one_pass(cpu, y, x, weight, masks, order, bias);
  }
}

}  // namespace mft
