// The masked linear layer and its d_x for few tokens, by the kernels of few_tokens.h.
#pragma once

#include <algorithm>

#include "few_tokens.h"
#include "linear.h"
#include "parallel.h"

namespace mft {

// Returns a call of few_tokens.h for `count` prepared tokens.
FewTokens few_tokens(const Matrix& out, const Weight& weight, const MaskSource& mask, const void* bias,
                     const float* tokens, int64_t count);

// masked_linear() and grad_x() of linear.h for columns `part` of the result. No matrix is empty. part.first is a
// multiple of 32.
void few_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Weight& weight,
                       const MaskSource& mask, const void* bias, Columns part);
void few_grad_x(const Capability& cpu, const Matrix& d_x, const Matrix& grad_output, const Weight& weight,
                const MaskSource& mask, const void* bias, Columns part);

// The least work of a thread, in bytes that it reads for one token (for more tokens see few_work()). With less, waking
// a second thread costs more than it saves. With twice as much, products were as fast from the caches and a third
// slower from memory (Xeon, 192 x 576 fp32).
constexpr int64_t kFewShare = 256 << 10;

inline int64_t few_work(int64_t bytes, int64_t count) { return bytes * (3 + count) / 4; }

// Calls f(first, end) for spans of `all`. They begin at multiples of `unit` from all.first and have at least kFewShare
// of the work.
template <typename F>
void for_few_spans(Columns all, int64_t unit, int64_t work, const F& f) {
  const int64_t units = (all.end - all.first + unit - 1) / unit;
  const int64_t grain = std::max<int64_t>(1, units * kFewShare / std::max<int64_t>(work, 1));
  parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    f(all.first + begin * unit, std::min(all.end, all.first + end * unit));
  });
}

}  // namespace mft
