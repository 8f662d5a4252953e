// score_step: the choice of the kernel for the formats, and the launches that find the next threshold and mask.
#include "score_step.cuh"

#include <algorithm>

#include "api.h"
#include "clear.h"

namespace mft::cuda {
namespace {

// Words of the workspace: whether the window missed the threshold, the window's counts, and what the selection needs.
constexpr int64_t kHeaderWords = 1040;
static_assert(1 + kWindowCounts <= kHeaderWords);

Type selected_as(ScoreFormat format) {
  return format == ScoreFormat::kFloat32    ? Type::kFloat32
         : format == ScoreFormat::kBFloat16 ? Type::kBFloat16
                                            : Type::kFloat16;
}

bool fits(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

template <ScoreFormat kFormat, bool kCoded, class Grad, class Weight>
std::string step(const ScoreStepArguments& arguments, const Device& device) {
  using Kernel = ScoreStepKernel<kFormat, kCoded, Grad, Weight>;
  constexpr int64_t kElements = int64_t{Kernel::kPairs} * kStepChunk;
  LaunchShape shape;
  shape.x = std::min<int64_t>((arguments.count + kElements - 1) / kElements,
                              Kernel::kBlocksPerMultiprocessor * device.multiprocessors);
  shape.shared_bytes = Kernel::kSharedBytes;
  return isa::launch<Kernel>(shape, device.stream, arguments);
}

template <ScoreFormat kFormat, bool kCoded, class Grad>
std::string step(const ScoreStep& s, const ScoreStepArguments& arguments, const Device& device) {
  if (s.weight == nullptr) return step<kFormat, kCoded, Grad, void>(arguments, device);
  return s.weight_type == Type::kFloat32 ? step<kFormat, kCoded, Grad, uint32_t>(arguments, device)
                                         : step<kFormat, kCoded, Grad, uint16_t>(arguments, device);
}

template <ScoreFormat kFormat>
std::string step(const ScoreStep& s, const ScoreStepArguments& arguments, const Device& device) {
  const bool wide = s.grad_type == Type::kFloat32;
  if (s.scales == nullptr) {
    return wide ? step<kFormat, false, uint32_t>(s, arguments, device)
                : step<kFormat, false, uint16_t>(s, arguments, device);
  }
  return wide ? step<kFormat, true, uint32_t>(s, arguments, device)
              : step<kFormat, true, uint16_t>(s, arguments, device);
}

std::string step(const ScoreStep& s, const uint16_t* hint, uint32_t* counts, const Device& device) {
  ScoreStepArguments a = {};
  a.scores = static_cast<char*>(s.scores);
  a.exp_avg = static_cast<char*>(s.exp_avg);
  a.exp_avg_sq = static_cast<char*>(s.exp_avg_sq);
  a.grad = static_cast<const char*>(s.grad);
  a.weight = static_cast<const char*>(s.weight);
  a.scales = s.scales;
  a.grad_scale = s.grad_scale;
  a.hint = hint;
  a.counts = counts;
  a.count = s.rows * s.columns;
  const int64_t moment = s.scales == nullptr ? 4 : 1;
  a.aligned = fits(s.scores, 4 * bytes_of(selected_as(s.format))) && fits(s.grad, 4 * bytes_of(s.grad_type)) &&
              fits(s.weight, 4 * bytes_of(s.weight_type)) && fits(s.exp_avg, 4 * moment) &&
              fits(s.exp_avg_sq, 4 * moment);
  a.grad_is_bfloat16 = s.grad_type == Type::kBFloat16;
  a.weight_is_bfloat16 = s.weight_type == Type::kBFloat16;
  a.magnitude = s.magnitude;
  a.sign = s.magnitude && s.weight != nullptr;
  a.seed_low = static_cast<uint32_t>(s.seed);
  a.seed_high = static_cast<uint32_t>(s.seed >> 32);
  a.beta1 = s.beta1, a.rest1 = s.rest1, a.beta2 = s.beta2, a.rest2 = s.rest2;
  a.eps = s.eps;
  a.clock = {s.step, s.decay, s.minus_step_size, s.correction};
  a.clock_in_memory = static_cast<const StepClock*>(s.clock);
  switch (s.format) {
    case ScoreFormat::kFloat32:
      return step<ScoreFormat::kFloat32>(s, a, device);
    case ScoreFormat::kBFloat16:
      return step<ScoreFormat::kBFloat16>(s, a, device);
    default:
      return step<ScoreFormat::kFixed16>(s, a, device);
  }
}

}  // namespace

int64_t step_workspace(ScoreFormat format) { return 4 * kHeaderWords + select_workspace(selected_as(format)); }

std::string score_step(const ScoreStep& s, const Device& device) {
  const int64_t count = s.rows * s.columns;
  Select select;
  select.scores = s.scores;
  select.type = selected_as(s.format);
  select.count = count;
  select.k = s.k;
  select.magnitude = s.magnitude;
  select.threshold = s.threshold;
  select.words = s.words;
  select.rows = s.rows, select.columns = s.columns;
  std::string error = s.threshold == nullptr ? "" : refusal(select);  // before anything changes
  if (!error.empty()) return error;

  const bool in_window = s.threshold != nullptr && s.hint != nullptr && bytes_of(select.type) == 2;
  const auto* const hint = in_window ? static_cast<const uint16_t*>(s.hint) : nullptr;
  uint32_t* const workspace = static_cast<uint32_t*>(s.workspace);
  uint32_t *const missed = workspace, *const counts = workspace + 1;
  if (in_window) error = clear(counts, kWindowCounts, device.stream);
  if (error.empty() && count > 0) error = step(s, hint, counts, device);
  if (error.empty() && in_window) {
    WindowArguments window = {};
    window.counts = counts;
    window.hint = hint;
    window.threshold = static_cast<uint16_t*>(s.threshold);
    window.missed = missed;
    window.kept = static_cast<uint32_t>(s.k);
    window.infinity = select.type == Type::kBFloat16 ? 0x7f80 : 0x7c00;
    window.magnitude = s.magnitude;
    LaunchShape shape;
    shape.shared_bytes = WindowKernel::kSharedBytes;
    error = isa::launch<WindowKernel>(shape, device.stream, window);
    select.only_if = missed;
  }
  if (!error.empty() || s.threshold == nullptr) return error;
  select.workspace = workspace + kHeaderWords;
  return kept_threshold(select, device);
}

}  // namespace mft::cuda
