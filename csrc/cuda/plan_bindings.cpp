// The launches of a call, remembered by the layout of its arguments. The next call with the same layout is one op, with
// nothing left to decide. mft_kernels/backends/triton/planned.py remembers them.

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cubin.h"
#include "place.h"

namespace {

using mft::cuda::Place;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments of a call; null: not given. The first is always given.
constexpr size_t kGiven = 6, kMostGiven = 32;
struct Call {
  std::array<const Tensor*, kMostGiven> given;
  int64_t kind;  // a number from Python for everything else that decides
  size_t count = kGiven;
};

struct Step {
  int64_t cubin = 0;
  mft::cuda::Grid grid;
  std::vector<int64_t> values;
  // The values to fill in: each is an index of values and a slot. Slots are the addresses of given, then of made; below
  // 0 they are the call's numbers, the first of which is -1.
  std::vector<std::pair<size_t, int64_t>> places;
};

// A contiguous tensor that each call makes again. It begins with zeros if launches count in it.
struct Made {
  ScalarType dtype;
  std::vector<int64_t> sizes;
  bool zeros;
};

struct Plan {
  std::vector<Made> made;
  size_t results = 0;  // the first ones of made; the others are scratch, given back in the order of the stream
  std::vector<Step> steps;
};

// Everything about the arguments that decided something: device, dtypes, sizes, strides, whether addresses are
// multiples of 16.
using Layout = std::vector<int64_t>;

void add(Layout& layout, const Tensor* t) {
  if (!t) {
    layout.push_back(-1);
    return;
  }
  const int64_t dim = t->dim();
  const bool aligned = reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0;
  layout.push_back(dim * 2 + aligned);
  layout.push_back(static_cast<int64_t>(t->scalar_type()) * 256 + t->get_device());
  for (int64_t i = 0; i < dim; ++i) layout.push_back(t->size(i)), layout.push_back(t->stride(i));
}

Layout layout_of(const Call& call) {
  Layout layout;
  layout.reserve(40);
  layout.push_back(call.kind);
  for (size_t i = 0; i < call.count; ++i) add(layout, call.given[i]);
  return layout;
}

bool asked(const char* name, const char* value) {
  const char* found = std::getenv(name);
  return found && std::strcmp(found, value) == 0;
}

// Plans by layout, some 2 KB each. Each length of a prompt is a layout of its own, so plans may become too many. Then
// the plans go that nobody has asked for since the newer half began.
class Plans {
 public:
  std::shared_ptr<const Plan> find(const Layout& layout) {
    const auto found = newer_.find(layout);
    if (found != newer_.end()) return found->second;
    const auto older = older_.find(layout);
    if (older == older_.end()) return nullptr;
    const auto plan = older->second;
    older_.erase(older);
    add(layout, plan);
    return plan;
  }
  void add(const Layout& layout, std::shared_ptr<const Plan> plan) {
    if (newer_.size() == kHalf) {
      older_.swap(newer_);
      newer_.clear();
    }
    newer_[layout] = std::move(plan);
  }
  void clear() { newer_.clear(), older_.clear(); }
  size_t size() const { return newer_.size() + older_.size(); }

 private:
  static constexpr size_t kHalf = 4096;
  std::map<Layout, std::shared_ptr<const Plan>> newer_, older_;
};

std::mutex lock;
Plans plans;

std::shared_ptr<const Plan> find(const Call& call) {
  if (asked("MFT_TRITON", "jit")) return nullptr;  // the JIT takes no cubin
  const Layout layout = layout_of(call);
  const std::lock_guard<std::mutex> guard(lock);
  return plans.find(layout);
}

// Launch the steps of a plan and return its results.
std::vector<Tensor> run(const Plan& plan, const Call& call, const std::vector<int64_t>& numbers = {}) {
  const Tensor& first = *call.given[0];
  const Place place(first);
  std::vector<int64_t> addresses;
  addresses.reserve(call.count + plan.made.size());
  for (size_t i = 0; i < call.count; ++i) {
    addresses.push_back(call.given[i] ? reinterpret_cast<int64_t>(call.given[i]->const_data_ptr()) : 0);
  }
  std::vector<Tensor> made;
  made.reserve(plan.made.size());
  for (const auto& [dtype, sizes, zeros] : plan.made) {
    made.push_back(torch::stable::new_empty(first, {sizes.data(), sizes.size()}, dtype));
    if (zeros) torch::stable::zero_(made.back());
    addresses.push_back(reinterpret_cast<int64_t>(made.back().const_data_ptr()));
  }
  std::vector<int64_t> values;
  for (const Step& step : plan.steps) {
    values = step.values;
    for (const auto& [at, slot] : step.places) values[at] = slot < 0 ? numbers.at(-1 - slot) : addresses[slot];
    const std::string error =
        mft::cuda::launch_cubin(step.cubin, place.index, place.device.stream, step.grid, values.data());
    STD_TORCH_CHECK(error.empty(), "a cubin of Triton's: ", error);
  }
  made.erase(made.begin() + plan.results, made.end());
  return made;
}

using Optional = std::optional<Tensor>;

const Tensor* pointer(const Optional& t) { return t.has_value() ? &*t : nullptr; }

// Return y, or nothing if no such call is remembered.
Optional planned_forward(Tensor x, Tensor weight, Tensor keep, Optional threshold, Optional bias, int64_t kind) {
  const Call call{{&x, &weight, &keep, pointer(threshold), pointer(bias), nullptr}, kind};
  const auto plan = find(call);
  if (!plan) return std::nullopt;
  return run(*plan, call)[0];
}

// The fast path of masked_linear_packed, by the bits of a packed mask, as "auto" has chosen.
Optional try_masked_linear_packed(Tensor x, Tensor weight, Tensor packed, Optional bias) {
  const char* backend = std::getenv("MFT_KERNELS");
  if (asked("MFT_AUTOTUNE", "1") || (backend && *backend && !asked("MFT_KERNELS", "auto"))) return std::nullopt;
  return planned_forward(x, weight, packed, std::nullopt, bias, 0);
}

// Return d_x, d_weight, d_scores and d_bias, or none of them if no such call is remembered.
std::vector<Tensor> planned_gradients(Tensor grad, Optional x, Tensor weight, Tensor keep, Optional threshold,
                                      Optional sign, int64_t kind) {
  const Call call{{&grad, pointer(x), &weight, &keep, pointer(threshold), pointer(sign)}, kind};
  const auto plan = find(call);
  if (!plan) return {};
  return run(*plan, call);
}

// Return whether such a call is remembered. If so, the sums have been added to out.
bool planned_sums(Tensor out, Tensor grad, Tensor x, Optional weight, Optional sign, int64_t kind) {
  const Call call{{&out, &grad, &x, pointer(weight), pointer(sign), nullptr}, kind};
  const auto plan = find(call);
  if (!plan) return false;
  run(*plan, call);
  return true;
}

Call call_of(const std::vector<Optional>& given, int64_t kind) {
  STD_TORCH_CHECK(!given.empty() && given.size() <= kMostGiven && given[0].has_value(), "given must be 1 to ", kMostGiven,
                  ", of which the first is there");
  Call call{{}, kind, given.size()};
  for (size_t i = 0; i < given.size(); ++i) call.given[i] = pointer(given[i]);
  return call;
}

// Return the results of any other call with these numbers, at least one; or none if no such call is remembered.
std::vector<Tensor> planned_call(std::vector<Optional> given, std::vector<int64_t> numbers, int64_t kind) {
  const Call call = call_of(given, kind);
  const auto plan = find(call);
  if (!plan) return {};
  return run(*plan, call, numbers);
}

// made: the tensors that the call has made, its results first. zeros: which of these begin as zeros. steps: for each,
// the cubin, the grid (3), the number of values, the values, the number of values to fill in, and for each of those its
// index and its slot: see Step.
void remember_plan(std::vector<Optional> given, int64_t kind, std::vector<Tensor> made, int64_t results,
                   std::vector<int64_t> zeros, int64_t numbers, std::vector<int64_t> steps) {
  const Call call = call_of(given, kind);
  Plan plan;
  plan.results = static_cast<size_t>(results);
  STD_TORCH_CHECK(plan.results <= made.size(), "results must be of what is made");
  for (const Tensor& t : made) {
    STD_TORCH_CHECK(t.is_contiguous(), "what is made must be contiguous");
    Made one{t.scalar_type(), {}, false};
    for (int64_t i = 0; i < t.dim(); ++i) one.sizes.push_back(t.size(i));
    plan.made.push_back(std::move(one));
  }
  for (const int64_t i : zeros) plan.made.at(static_cast<size_t>(i)).zeros = true;
  size_t at = 0;
  const auto next = [&] {
    STD_TORCH_CHECK(at < steps.size(), "steps end too soon");
    return steps[at++];
  };
  while (at < steps.size()) {
    Step step;
    step.cubin = next();
    for (unsigned* size : {&step.grid.x, &step.grid.y, &step.grid.z}) *size = static_cast<unsigned>(next());
    for (int64_t left = next(); left > 0; --left) step.values.push_back(next());
    for (int64_t left = next(); left > 0; --left) {
      const auto value = static_cast<size_t>(next());
      const int64_t slot = next(), end = static_cast<int64_t>(call.count + made.size());
      STD_TORCH_CHECK(value < step.values.size() && slot < end && -1 - slot < numbers, "steps must name values and slots");
      step.places.emplace_back(value, slot);
    }
    const size_t wanted = mft::cuda::cubin_values(step.cubin);
    STD_TORCH_CHECK(step.values.size() == wanted, "a launch of this cubin takes ", wanted, " values, got ",
                    step.values.size());
    plan.steps.push_back(std::move(step));
  }
  const Layout layout = layout_of(call);
  const std::lock_guard<std::mutex> guard(lock);
  plans.add(layout, std::make_shared<const Plan>(std::move(plan)));
}

void forget_plans() {
  const std::lock_guard<std::mutex> guard(lock);
  plans.clear();
}

int64_t count_plans() {
  const std::lock_guard<std::mutex> guard(lock);
  return static_cast<int64_t>(plans.size());
}

}  // namespace

MFT_OPS(m) {
  m.def("planned_forward(Tensor x, Tensor weight, Tensor keep, Tensor? threshold, Tensor? bias, int kind) -> Tensor?");
  m.def("try_masked_linear_packed(Tensor x, Tensor weight, Tensor packed, Tensor? bias) -> Tensor?");
  m.def(
      "planned_gradients(Tensor grad_output, Tensor? x, Tensor weight, Tensor keep, Tensor? threshold, Tensor? sign, "
      "int kind) -> Tensor[]");
  m.def(
      "planned_sums(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor? weight, Tensor? sign, int kind) -> bool");
  m.def("planned_call(Tensor?[] given, int[] numbers, int kind) -> Tensor[]");
  m.def(
      "remember_plan(Tensor?[] given, int kind, Tensor[] made, int results, int[] zeros, int numbers, int[] steps) -> ()");
  m.def("forget_plans() -> ()");
  m.def("count_plans() -> int");
}

MFT_OPS_ON(CompositeExplicitAutograd, m) {
  m.impl("planned_forward", TORCH_BOX(&planned_forward));
  m.impl("try_masked_linear_packed", TORCH_BOX(&try_masked_linear_packed));
  m.impl("planned_gradients", TORCH_BOX(&planned_gradients));
  m.impl("planned_sums", TORCH_BOX(&planned_sums));
  m.impl("planned_call", TORCH_BOX(&planned_call));
  m.impl("remember_plan", TORCH_BOX(&remember_plan));
  m.impl("forget_plans", TORCH_BOX(&forget_plans));
  m.impl("count_plans", TORCH_BOX(&count_plans));
}
