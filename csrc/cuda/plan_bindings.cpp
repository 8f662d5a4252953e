// A forward's launches, remembered by the layout of its arguments: the next call alike is one op, with nothing left to
// decide. mft_kernels/triton/planned.py remembers them.

#include <torch/csrc/stable/ops.h>

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

// What is known of where a value comes from: one of these tensors' addresses.
enum Slot { kX, kWeight, kKeep, kThreshold, kBias, kOut, kParts, kSlots };

struct Step {
  int64_t cubin = 0;
  mft::cuda::Grid grid;
  std::vector<int64_t> values;
  std::vector<std::pair<size_t, Slot>> addresses;  // which values are a tensor's, to be put in
};

struct Plan {
  int64_t parts = 0;  // elements of fp32 scratch
  std::vector<Step> steps;
};

// Everything of the arguments that decided something: device, dtypes, sizes, strides, addresses as multiples of 16.
using Layout = std::vector<int64_t>;

struct Call {
  const Tensor *x, *weight, *keep, *threshold, *bias;  // null: none
  int64_t kind;
};

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
  layout.reserve(32);
  layout.push_back(call.kind);
  for (const Tensor* t : {call.x, call.weight, call.keep, call.threshold, call.bias}) add(layout, t);
  return layout;
}

std::mutex lock;
std::map<Layout, std::shared_ptr<const Plan>> plans;

std::shared_ptr<const Plan> find(const Call& call) {
  const Layout layout = layout_of(call);
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = plans.find(layout);
  return found == plans.end() ? nullptr : found->second;
}

Tensor run(const Plan& plan, const Call& call) {
  const Place place(*call.weight);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < call.x->dim(); ++i) sizes.push_back(call.x->size(i));
  sizes.push_back(call.weight->size(0));
  Tensor out = torch::stable::new_empty(*call.x, {sizes.data(), sizes.size()});
  std::optional<Tensor> parts;  // given back in the order of the stream
  if (plan.parts > 0) parts = torch::stable::new_empty(*call.x, {&plan.parts, 1}, ScalarType::Float);

  const auto address = [](const Tensor* t) { return t ? reinterpret_cast<int64_t>(t->const_data_ptr()) : 0; };
  const int64_t addresses[kSlots] = {address(call.x),    address(call.weight), address(call.keep), address(call.threshold),
                                     address(call.bias), address(&out),        parts ? address(&*parts) : 0};
  std::vector<int64_t> values;
  for (const Step& step : plan.steps) {
    values = step.values;
    for (const auto& [at, slot] : step.addresses) values[at] = addresses[slot];
    const std::string error =
        mft::cuda::launch_cubin(step.cubin, place.index, place.device.stream, step.grid, values.data());
    STD_TORCH_CHECK(error.empty(), "a cubin of Triton's: ", error);
  }
  return out;
}

const Tensor* pointer(const std::optional<Tensor>& t) { return t.has_value() ? &*t : nullptr; }

// y, or nothing where no such call is remembered. kind: 2 * what tells the mask + whether "auto" has chosen.
std::optional<Tensor> planned_forward(Tensor x, Tensor weight, Tensor keep, std::optional<Tensor> threshold,
                                      std::optional<Tensor> bias, int64_t kind) {
  const Call call{&x, &weight, &keep, pointer(threshold), pointer(bias), kind};
  const auto plan = find(call);
  if (!plan) return std::nullopt;
  return run(*plan, call);
}

// By the bits of a packed mask, as "auto" has chosen: the short way of masked_linear_packed.
std::optional<Tensor> try_masked_linear_packed(Tensor x, Tensor weight, Tensor packed, std::optional<Tensor> bias) {
  return planned_forward(x, weight, packed, std::nullopt, bias, 1);
}

// steps: of each, cubin, grid (3), how many values, the values, how many addresses, and of each which value and slot.
void plan_forward(Tensor x, Tensor weight, Tensor keep, std::optional<Tensor> threshold, std::optional<Tensor> bias,
                  int64_t kind, int64_t parts, std::vector<int64_t> steps) {
  Plan plan;
  plan.parts = parts;
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
      const int64_t slot = next();
      STD_TORCH_CHECK(value < step.values.size() && slot >= 0 && slot < kSlots, "steps must name values and slots");
      step.addresses.emplace_back(value, static_cast<Slot>(slot));
    }
    const size_t wanted = mft::cuda::cubin_values(step.cubin);
    STD_TORCH_CHECK(step.values.size() == wanted, "a launch of this cubin takes ", wanted, " values, got ",
                    step.values.size());
    plan.steps.push_back(std::move(step));
  }
  const Layout layout = layout_of({&x, &weight, &keep, pointer(threshold), pointer(bias), kind});
  const std::lock_guard<std::mutex> guard(lock);
  plans[layout] = std::make_shared<const Plan>(std::move(plan));
}

void forget_plans() {
  const std::lock_guard<std::mutex> guard(lock);
  plans.clear();
}

}  // namespace

MFT_LIBRARY_FRAGMENT(MFT_NAMESPACE, m) {
  m.def("planned_forward(Tensor x, Tensor weight, Tensor keep, Tensor? threshold, Tensor? bias, int kind) -> Tensor?");
  m.def("try_masked_linear_packed(Tensor x, Tensor weight, Tensor packed, Tensor? bias) -> Tensor?");
  m.def(
      "plan_forward(Tensor x, Tensor weight, Tensor keep, Tensor? threshold, Tensor? bias, int kind, int parts, "
      "int[] steps) -> ()");
  m.def("forget_plans() -> ()");
}

MFT_LIBRARY_IMPL(MFT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("planned_forward", TORCH_BOX(&planned_forward));
  m.impl("try_masked_linear_packed", TORCH_BOX(&try_masked_linear_packed));
  m.impl("plan_forward", TORCH_BOX(&plan_forward));
  m.impl("forget_plans", TORCH_BOX(&forget_plans));
}
