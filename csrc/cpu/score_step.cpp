// One optimiser step on a matrix of scores, on all threads; counts the new scores' keys in the same pass.
#include "score_step.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "parallel.h"
#include "select.h"
#include "torch_matmul.h"

namespace mft {
namespace {

// Elements that are stepped before their keys are counted. Their scores, gradients and moments (24 bytes each) stay in
// L2, and the cost of calling torch's sqrt (1 us per call) does not show.
constexpr int64_t kSpan = 8192;

void step_span(const StepKernels& kernels, const StepTensors& t, const StepConstants& c, float* root, int64_t begin,
               int64_t n) {
  if (t.mean_scales == nullptr) {
    kernels.moments(t, c, begin, n);
    torch_sqrt(root, static_cast<const float*>(t.exp_avg_sq) + begin, n);
    kernels.scores(t, c, root, begin, n);
    return;
  }
  for (int64_t done = 0; done < n; done += kStepChunk) {
    kernels.chunk(t, c, begin + done, std::min(kStepChunk, n - done));
  }
}

}  // namespace

uint32_t score_step(const StepKernels& kernels, const StepTensors& t, const StepConstants& c, int64_t n, int64_t k,
                    bool magnitude, const void* near) {
  const Format format = selected_as(t.score_format);
  std::optional<Window> window;
  if (k >= 0 && near != nullptr) window.emplace(t.scores, format, n, magnitude, keys_near(near, format, magnitude));
  const int64_t spans = (n + kSpan - 1) / kSpan;
  parallel_for(0, spans, 4, [&](int64_t first, int64_t last) {
    std::vector<float> root(t.mean_scales == nullptr ? kSpan : 0);
    for (int64_t begin = first * kSpan, end = std::min(last * kSpan, n); begin < end; begin += kSpan) {
      const int64_t here = std::min(kSpan, end - begin);
      step_span(kernels, t, c, root.data(), begin, here);
      if (window) window->count(begin, begin + here);
    }
  });
  uint32_t bits = 0;
  if (k < 0 || (window && window->find(k, bits))) return bits;
  return kth_largest(t.scores, format, n, k, magnitude);
}

}  // namespace mft
