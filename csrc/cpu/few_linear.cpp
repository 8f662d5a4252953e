// The masked linear layer and its d_x for few tokens. The tokens are prepared once. Then threads share the rows of the
// weight (forward) or its columns (d_x), so that one thread computes each sum. More than kFewTokens tokens go in turns.
#include "few_linear.h"

#include <algorithm>

#include "scratch.h"

namespace mft {
namespace {

using Prepare = void (*)(float*, const void*, Format, int64_t);

// The tokens as a kernel reads them.
class Prepared {
 public:
  Prepared(const Matrix& tokens, Prepare prepare)
      : memory_(tokens.rows * few_token_stride(tokens.columns) * sizeof(float)) {
    const int64_t stride = few_token_stride(tokens.columns);
    for (int64_t t = 0; t < tokens.rows; ++t) {
      prepare(static_cast<float*>(memory_.get()) + t * stride, tokens.row(t), tokens.format, tokens.columns);
    }
  }
  const float* get() const { return static_cast<const float*>(memory_.get()); }

 private:
  Scratch memory_;
};

int64_t bytes_read(const Weight& weight, const MaskSource& mask) {
  const int64_t each = bytes_of(weight.format) + (mask.scores != nullptr ? bytes_of(mask.score_format) : 0);
  return weight.rows * weight.columns * each;
}

}  // namespace

FewTokens few_tokens(const Matrix& out, const Weight& weight, const MaskSource& mask, const void* bias,
                     const float* tokens, int64_t count) {
  FewTokens call{weight.format, count, weight.rows, weight.columns, static_cast<const char*>(weight.data), mask.scores,
                 mask.score_format, mask.words, mask.range, static_cast<const char*>(bias), tokens,
                 static_cast<char*>(out.data)};
  call.keeps_all = mask.keeps_all, call.codes = weight.codes, call.decode = weight.decode;
  return call;
}

void few_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Weight& weight,
                       const MaskSource& mask, const void* bias, Columns part) {
  const int64_t words = mask.scores == nullptr ? 0 : kDotRows * ((weight.columns + 31) / 32);
  for (int64_t t = 0; t < x.rows; t += kFewTokens) {
    const int64_t count = std::min(kFewTokens, x.rows - t);
    const Prepared tokens(x.narrow_rows(t, count), cpu.few->prepare_dot);
    const FewTokens call = few_tokens(y.narrow_rows(t, count), weight, mask, bias, tokens.get(), count);
    for_few_spans(part, kDotRows, few_work(bytes_read(weight, mask), count), [&](int64_t first, int64_t end) {
      const Scratch scratch(words * sizeof(uint32_t)), decoded(weight.room(kDotRows * weight.columns));
      FewTokens own = call;
      own.room = static_cast<char*>(decoded.get());
      cpu.few->dot(own, first, end, static_cast<uint32_t*>(scratch.get()));
    });
  }
}

void few_grad_x(const Capability& cpu, const Matrix& d_x, const Matrix& grad_output, const Weight& weight,
                const MaskSource& mask, const void* bias, Columns part) {
  for (int64_t t = 0; t < grad_output.rows; t += kFewTokens) {
    const int64_t count = std::min(kFewTokens, grad_output.rows - t);
    const Prepared tokens(grad_output.narrow_rows(t, count), cpu.few->prepare_sum);
    const FewTokens call = few_tokens(d_x.narrow_rows(t, count), weight, mask, bias, tokens.get(), count);
    for_few_spans(part, 64, few_work(bytes_read(weight, mask), count), [&](int64_t first, int64_t end) {
      const int64_t strip = few_strip_columns(call.format, count);
      const Scratch scratch(count * (strip + 16) * sizeof(float)), decoded(weight.room(kDotRows * strip));
      FewTokens own = call;
      own.room = static_cast<char*>(decoded.get());
      cpu.few->sum(own, first, end, static_cast<float*>(scratch.get()));
    });
  }
}

}  // namespace mft
