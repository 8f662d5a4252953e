// d_scores on Hopper: what its kernel takes, and which instance serves it.
#include <string>

#include "api.h"

namespace mft::cuda {

// score_grad_sm90_bf16.cu and score_grad_sm90_fp16.cu
std::string score_grad_sm90_bf16(const ScoreGrad&, const Device&);
std::string score_grad_sm90_fp16(const ScoreGrad&, const Device&);

namespace {

constexpr int64_t kAlignment = 16;  // bytes, of TMA
constexpr int64_t kLargest = 0x7fffffff;

std::string refusal_of(const std::string& name, const Matrix& matrix) {
  const int64_t row = matrix.stride * bytes_of(matrix.type);
  if (row % kAlignment != 0) {
    return name + "'s rows must begin at multiples of 16 bytes, got a stride of " + std::to_string(row) + " bytes";
  }
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(matrix.data) % kAlignment);
  if (past != 0) {
    return name + " must begin at a multiple of 16 bytes, got " + std::to_string(past) + " bytes past one";
  }
  return "";
}

std::string refusal_of_size(const std::string& name, int64_t size) {
  if (size < 1 || size > kLargest) {
    return name + " must be 1 to 2147483647, got " + std::to_string(size);
  }
  return "";
}

}  // namespace

std::string refusal_sm90(const ScoreGrad& problem) {
  if (problem.weight.type == Type::kFloat32) return "weight must be bf16 or fp16, got fp32";
  if (problem.d_weight.data != nullptr) return "d_weight must not be wanted";
  if (problem.d_scores.data == nullptr) return "d_scores must be wanted";
  if (problem.d_scores.type != Type::kFloat32 && problem.d_scores.type != problem.weight.type) {
    return "d_scores must be fp32 or of weight's type, got the other 16-bit float";
  }
  for (const auto& [name, size] : {std::pair<const char*, int64_t>{"tokens", problem.x.rows},
                                   {"out_features", problem.weight.rows},
                                   {"in_features", problem.weight.columns}}) {
    if (std::string text = refusal_of_size(name, size); !text.empty()) return text;
    if (name != std::string("tokens") && size % 8 != 0) {
      return std::string(name) + " must be a multiple of 8, got " + std::to_string(size);
    }
  }
  const std::pair<const char*, const Matrix*> matrices[] = {{"grad_output", &problem.grad_output},
                                                            {"x", &problem.x},
                                                            {"weight", &problem.weight},
                                                            {"d_scores", &problem.d_scores},
                                                            {"scores", &problem.sign.scores}};
  for (const auto& [name, matrix] : matrices) {
    if (matrix->data == nullptr) continue;  // the scores, if the sign comes from bits
    if (std::string text = refusal_of(name, *matrix); !text.empty()) return text;
  }
  return "";
}

std::string score_grad_sm90(const ScoreGrad& problem, const Device& device) {
  if (std::string text = refusal_sm90(problem); !text.empty()) return text;
  return problem.weight.type == Type::kBFloat16 ? score_grad_sm90_bf16(problem, device)
                                                : score_grad_sm90_fp16(problem, device);
}

}  // namespace mft::cuda
