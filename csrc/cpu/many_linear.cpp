// The masked linear layer for few tokens with a mask each: tokens are sorted by mask and prepared once, then threads share
// the rows of the weight. More tokens go in turns.
#include "many_linear.h"

#include <algorithm>
#include <numeric>

#include "choice.h"
#include "few_linear.h"
#include "parallel.h"
#include "scratch.h"

namespace mft {

void many_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
                        const std::vector<const uint32_t*>& masks, const int64_t* tasks, int64_t each,
                        const void* bias) {
  const std::vector<uint32_t> all((weight.columns + 31) / 32, ~0u);
  const int64_t stride = few_token_stride(weight.columns);
  for (int64_t turn = 0; turn < x.rows; turn += kFewTokens) {
    const int64_t count = std::min(kFewTokens, x.rows - turn);
    const auto task_of = [&](int64_t row) { return tasks[row / each]; };
    int64_t places[kFewTokens];
    std::iota(places, places + count, turn);
    std::stable_sort(places, places + count, [&](int64_t a, int64_t b) { return task_of(a) < task_of(b); });
    const Scratch tokens(count * stride * sizeof(float));
    FewTokens calls[kFewTokens];
    int64_t used = 0;
    for (int64_t t = 0; t < count; ++t) {
      float* token = static_cast<float*>(tokens.get()) + t * stride;
      cpu.few->prepare_dot(token, x.row(places[t]), x.format, x.columns);
      const int64_t task = task_of(places[t]);
      if (t > 0 && task == task_of(places[t - 1])) {
        ++calls[used - 1].count;
        continue;
      }
      calls[used++] = {weight.format,
                       1,
                       weight.rows,
                       weight.columns,
                       static_cast<const char*>(weight.data),
                       nullptr,
                       Format::kFloat32,
                       task < 0 ? nullptr : masks[task],
                       {0, 0, false},
                       static_cast<const char*>(bias),
                       token,
                       static_cast<char*>(y.data),
                       places + t};
    }
    const int64_t bytes = weight.rows * weight.columns * bytes_of(weight.format);
    for_few_spans(weight.rows, kDotRows, few_work(bytes, count), [&](int64_t first, int64_t end) {
      cpu.few->dot_many(calls, used, first, end, all.data());
    });
  }
}

bool is_read_once(const Capability& cpu, const Matrix& x, const Matrix& weight, int64_t used) {
  constexpr double kMask = 1.0 / 8;
  const Call alone{Product::kForward, weight.format, (x.rows + used - 1) / used, weight.rows, weight.columns,
                   weight_bytes(Product::kForward, bytes_of(weight.format), kMask), kMask};
  return used > 1 && choose(cpu.name, alone, Path::kAuto) == Path::kFew;
}

}  // namespace mft
