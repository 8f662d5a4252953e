// d_scores on Hopper: what its kernel takes, and which instance serves it.
#include <string>

#include "api.h"

namespace mft::cuda {

// score_grad_sm90_bf16.cu and score_grad_sm90_fp16.cu
std::string score_grad_sm90_bf16(const ScoreGrad&, const Device&);
std::string score_grad_sm90_fp16(const ScoreGrad&, const Device&);

namespace {

constexpr int64_t kAlignment = 16;                    // bytes, of TMA
constexpr int64_t kLargestStride = int64_t{1} << 40;  // bytes, of TMA
constexpr int64_t kLargestSize = int64_t{1} << 30;    // coordinates are ints

// Why a matrix cannot be read as the kernel reads it, or "".
std::string refusal_of(const std::string& name, const Matrix& matrix) {
  const int64_t row = matrix.stride * bytes_of(matrix.type);
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(matrix.data));
  if (address % kAlignment != 0) {
    return name + " must begin at a multiple of 16 bytes, got " + std::to_string(address % kAlignment) +
           " bytes past one";
  }
  if (row % kAlignment != 0) {
    return name + "'s rows must begin at multiples of 16 bytes, got a stride of " + std::to_string(row) + " bytes";
  }
  if (matrix.stride < matrix.columns || row >= kLargestStride) {
    return name + "'s rows must not overlap and lie less than 2^40 bytes apart, got a stride of " +
           std::to_string(row) + " bytes";
  }
  return "";
}

std::string refusal_of_size(const std::string& name, int64_t size, int64_t multiple) {
  if (size >= 1 && size <= kLargestSize && size % multiple == 0) return "";
  return name + " must be 1 to 2^30" + (multiple > 1 ? " and a multiple of " + std::to_string(multiple) : "") +
         ", got " + std::to_string(size);
}

}  // namespace

std::string refusal_sm90(const ScoreGrad& problem) {
  const Type type = problem.weight.type;
  if (type == Type::kFloat32) return "weight must be bf16 or fp16, got fp32";
  if (problem.d_weight.data != nullptr) return "d_weight must not be wanted, this kernel computes d_scores alone";
  if (problem.d_scores.data == nullptr) return "d_scores must be wanted, got none";
  if (problem.d_scores.type != Type::kFloat32 && problem.d_scores.type != type) {
    return "d_scores must be fp32 or of weight's type, got the other 16-bit float";
  }
  for (const std::string& refusal :
       {refusal_of_size("tokens", problem.x.rows, 1), refusal_of_size("out_features", problem.weight.rows, 8),
        refusal_of_size("in_features", problem.weight.columns, 8), refusal_of("grad_output", problem.grad_output),
        refusal_of("x", problem.x), refusal_of("weight", problem.weight), refusal_of("d_scores", problem.d_scores)}) {
    if (!refusal.empty()) return refusal;
  }
  const Sign& sign = problem.sign;
  return sign.words == nullptr && sign.scores.data != nullptr ? refusal_of("scores", sign.scores) : "";
}

std::string score_grad_sm90(const ScoreGrad& problem, const Device& device) {
  const std::string refusal = refusal_sm90(problem);
  if (!refusal.empty()) return refusal;
  return problem.weight.type == Type::kBFloat16 ? score_grad_sm90_bf16(problem, device)
                                                : score_grad_sm90_fp16(problem, device);
}

}  // namespace mft::cuda
