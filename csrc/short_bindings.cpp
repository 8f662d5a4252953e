// The ops of namespace mft_cpu that are fast paths. Each op does all checks itself. It returns nothing if a call is not
// the usual one, or if an environment variable says how to serve it. Then the general path serves the call, or says
// what is wrong with it. mft_kernels/ops/route.py calls these ops.

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu/capability.h"
#include "cpu/many_linear.h"
#include "operands.h"
#include "text.h"

namespace mft::ops {
namespace {

using Optional = std::optional<Tensor>;

// Return whether an environment variable is set, and to something else than its default.
bool asks(const char* variable, const char* unset) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0' && std::strcmp(value, unset) != 0;
}

bool is_asked_for() { return asks("MFT_KERNELS", "auto") || asks("MFT_AUTOTUNE", "0"); }

// Return whether a tensor is dense, contiguous, and on the CPU.
bool is_usual(const Tensor& t) {
  int32_t layout = -1;
  aoti_torch_get_layout(t.get(), &layout);
  return layout == aoti_torch_layout_strided() && t.is_cpu() && t.is_contiguous();
}

bool is_taken(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return is_usual(t) && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

// Return whether t holds the words of a mask or of signs.
bool is_words(const Tensor& t, int64_t rows, int64_t columns) {
  return t.scalar_type() == ScalarType::Int && is_matrix(t, rows, (columns + 31) / 32);
}

// Return whether t holds tokens (..., columns), with at least this number of dimensions.
bool is_tokens(const Tensor& t, ScalarType type, int64_t columns, int64_t dimensions = 1) {
  return t.scalar_type() == type && is_usual(t) && t.dim() >= dimensions && t.size(-1) == columns;
}

bool is_bias(const Optional& t, ScalarType type, int64_t rows) {
  return !t.has_value() || (t->scalar_type() == type && is_usual(*t) && t->dim() == 1 && t->size(0) == rows);
}

const void* data_of(const Optional& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

bool is_weight(const Tensor& t) { return is_taken(t.scalar_type()) && is_usual(t) && t.dim() == 2; }

// Return whether t holds one score per weight; below, whether t is the threshold for these scores.
bool is_scores(const Tensor& t, int64_t rows, int64_t columns) {
  return is_taken(t.scalar_type()) && is_matrix(t, rows, columns);
}
bool is_threshold(const Tensor& t, const Tensor& scores) {
  return t.scalar_type() == scores.scalar_type() && is_usual(t) && t.dim() == 0;
}

bool is_mode(const std::string& mode) { return mode == "magnitude" || mode == "value"; }

MaskSource mask_of(const Tensor& packed, const Matrix& weight) {
  return mask_source(std::nullopt, std::nullopt, packed, false, weight.rows, weight.columns);
}
MaskSource mask_of(const Tensor& scores, const Tensor& threshold, const std::string& mode, const Matrix& weight) {
  return mask_source(scores, threshold, std::nullopt, mode == "magnitude", weight.rows, weight.columns);
}

Optional try_masked_linear(Tensor x, Tensor weight, Tensor scores, Tensor threshold, Optional bias, Text mode) {
  if (is_asked_for() || !is_weight(weight) || !is_mode(mode)) return std::nullopt;
  const ScalarType type = weight.scalar_type();
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (!is_tokens(x, type, columns) || !is_bias(bias, type, rows)) return std::nullopt;
  if (!is_scores(scores, rows, columns) || !is_threshold(threshold, scores)) return std::nullopt;
  const Matrix w = input(weight, "weight");
  return forward_of(x, w, mask_of(scores, threshold, mode, w), data_of(bias));
}

// Without packed, every weight is kept.
Optional try_masked_linear_packed(Tensor x, Tensor weight, Optional packed, Optional bias) {
  if (is_asked_for() || !is_weight(weight)) return std::nullopt;
  const ScalarType type = weight.scalar_type();
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (!is_tokens(x, type, columns) || !is_bias(bias, type, rows)) return std::nullopt;
  if (packed.has_value() && !is_words(*packed, rows, columns)) return std::nullopt;
  const Matrix w = input(weight, "weight");
  std::vector<uint32_t> all;
  return forward_of(x, w, packed.has_value() ? mask_of(*packed, w) : keep_all(all, columns), data_of(bias));
}

// Return whether no gradients but d_x and d_scores are wanted, which are the usual ones.
bool is_wanted(const std::vector<bool>& output_mask) {
  return output_mask.size() == 4 && !output_mask[1] && !output_mask[3];
}

// Return d_x, d_weight, d_scores and d_bias, with shape (0,) for those that are not wanted.
std::vector<Tensor> gradients(const Tensor& grad_output, const Tensor& x, const Tensor& weight, const MaskSource& mask,
                              const mft::SignSource& sign, ScalarType score_type, const std::vector<bool>& output_mask) {
  const Matrix w = input(weight, "weight");
  std::vector<Tensor> grads(4, torch::stable::new_empty(weight, {0}));
  if (output_mask[0]) grads[0] = d_x_of(grad_output, w, mask);
  if (output_mask[2]) {
    const Matrix grad = tokens_of(grad_output, "grad_output", w.rows, w.format);
    grads[2] = empty_gradient(weight, score_type, grad.rows);
    const Matrix d_scores = output(grads[2], "d_scores");
    mft::grad_scores(mft::chosen_capability(), d_scores, grad, tokens_of(x, "x", w.columns, w.format), w, sign, false);
  }
  return grads;
}

// Return whether the weight is not empty and grad_output has at least one token; if x is read, it must have as many
// tokens.
bool is_step(const Tensor& grad_output, const Tensor& x, const Tensor& weight, bool reads_x) {
  const ScalarType type = weight.scalar_type();
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (weight.numel() == 0 || !is_tokens(grad_output, type, rows) || grad_output.numel() == 0) return false;
  return !reads_x || (is_tokens(x, type, columns) && x.numel() == grad_output.numel() / rows * columns);
}

// Return nothing if d_weight or d_bias is wanted too.
std::vector<Tensor> try_masked_linear_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, Tensor threshold,
                                               Text mode, std::vector<bool> output_mask) {
  if (is_asked_for() || !is_weight(weight) || !is_mode(mode) || !is_wanted(output_mask)) return {};
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (!is_step(grad_output, x, weight, output_mask[2])) return {};
  if (!is_scores(scores, rows, columns) || !is_threshold(threshold, scores)) return {};
  const auto sign = sign_source(mode == "magnitude" ? Optional(scores) : std::nullopt, std::nullopt, rows, columns);
  const MaskSource mask = mask_of(scores, threshold, mode, input(weight, "weight"));
  return gradients(grad_output, x, weight, mask, sign, scores.scalar_type(), output_mask);
}

std::vector<Tensor> try_masked_linear_packed_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor packed,
                                                      Optional scores, Optional signs, Text mode,
                                                      std::vector<bool> output_mask) {
  if (is_asked_for() || !is_weight(weight) || !is_wanted(output_mask)) return {};
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (!is_step(grad_output, x, weight, output_mask[2]) || !is_words(packed, rows, columns)) return {};
  const bool is_signed = output_mask[2] && mode != "value";
  if (output_mask[2] && scores.has_value() && !is_scores(*scores, rows, columns)) return {};
  if (is_signed && (signs.has_value() ? !is_words(*signs, rows, columns) : !scores.has_value())) return {};
  const ScalarType score_type = scores.has_value() ? scores->scalar_type() : ScalarType::Float;
  const mft::SignSource sign =
      sign_source(is_signed ? scores : std::nullopt, is_signed ? signs : std::nullopt, rows, columns);
  const MaskSource mask = mask_of(packed, input(weight, "weight"));
  return gradients(grad_output, x, weight, mask, sign, score_type, output_mask);
}

// Return whether out += grad_output.T @ x has been done.
bool try_accumulate_product(Tensor out, Tensor grad_output, Tensor x) {
  const ScalarType type = x.scalar_type();
  if (is_asked_for() || !is_taken(type) || !is_taken(out.scalar_type()) || !is_usual(out) || out.dim() != 2) return false;
  const int64_t rows = out.size(0), columns = out.size(1);
  if (!is_tokens(grad_output, type, rows) || !is_tokens(x, type, columns) || out.numel() == 0) return false;
  const Format format = format_of(x, "x");
  const Matrix grad = tokens_of(grad_output, "grad_output", rows, format), in = tokens_of(x, "x", columns, format);
  if (grad.rows == 0 || x.dim() != grad_output.dim()) return false;
  for (int64_t d = 0; d < x.dim() - 1; ++d) {
    if (x.size(d) != grad_output.size(d)) return false;
  }
  const Matrix no_weight{nullptr, in.format, rows, columns, columns};
  mft::grad_scores(mft::chosen_capability(), output(out, "out"), grad, in, no_weight,
                   {nullptr, Format::kFloat32, nullptr, columns}, true);
  return true;
}

// Return y for x (rows, ..., K): y[i] uses masks[tasks[i]], or the whole weight for task -1. With way "short" this is a
// fast path as above. "auto" serves the call even if an environment variable says how to serve it. "dots" and "tiles" do
// so too, that way even if another is faster.
Optional try_masked_linear_many(Tensor x, Tensor weight, std::vector<Tensor> masks, Tensor tasks, Optional bias,
                                Text way) {
  const ScalarType type = weight.scalar_type();
  if ((way == "short" && is_asked_for()) || !is_taken(type) || !is_usual(weight) || weight.dim() != 2) return std::nullopt;
  const int64_t rows = weight.size(0), columns = weight.size(1), count = static_cast<int64_t>(masks.size());
  if (!is_tokens(x, type, columns, 2) || x.numel() == 0 || rows == 0 || !is_bias(bias, type, rows)) return std::nullopt;
  if (tasks.scalar_type() != ScalarType::Long || !is_usual(tasks) || tasks.dim() != 1 || tasks.size(0) != x.size(0)) {
    return std::nullopt;
  }
  std::vector<const uint32_t*> bits;
  for (const Tensor& mask : masks) {
    if (!is_words(mask, rows, columns)) return std::nullopt;
    bits.push_back(static_cast<const uint32_t*>(mask.const_data_ptr()));
  }
  const auto* task = static_cast<const int64_t*>(tasks.const_data_ptr());
  for (int64_t i = 0; i < tasks.size(0); ++i) {
    if (task[i] < -1 || task[i] >= count) return std::nullopt;
  }
  const Matrix w = input(weight, "weight"), in = tokens_of(x, "x", columns, w.format);
  Tensor y = empty_product(x, in.rows, rows);
  mft::many_masked_linear(mft::chosen_capability(), flat(y, rows, "y", y.mutable_data_ptr()), in, w, bits, task,
                          in.rows / x.size(0), data_of(bias),
                          way == "dots"    ? mft::ManyWay::kDots
                          : way == "tiles" ? mft::ManyWay::kTiles
                                           : mft::ManyWay::kAuto);
  return y;
}

}  // namespace

MFT_OPS(CompositeExplicitAutograd) {
  MFT_OP(try_masked_linear,
         "(Tensor x, Tensor weight, Tensor scores, Tensor threshold, Tensor? bias, str mode) -> Tensor?");
  MFT_OP(try_masked_linear_backward,
         "(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, Tensor threshold, str mode, bool[] output_mask) "
         "-> Tensor[]");
  MFT_OP(try_masked_linear_packed, "(Tensor x, Tensor weight, Tensor? packed, Tensor? bias) -> Tensor?");
  MFT_OP(try_masked_linear_packed_backward,
         "(Tensor grad_output, Tensor x, Tensor weight, Tensor packed, Tensor? scores, Tensor? signs, str mode, bool[] "
         "output_mask) -> Tensor[]");
  MFT_OP(try_accumulate_product, "(Tensor(a!) out, Tensor grad_output, Tensor x) -> bool");
  MFT_OP(try_masked_linear_many,
         "(Tensor x, Tensor weight, Tensor[] masks, Tensor tasks, Tensor? bias, str way) -> Tensor?");
}

}  // namespace mft::ops
