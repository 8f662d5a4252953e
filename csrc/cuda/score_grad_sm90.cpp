// d_scores on Hopper: which problems its kernel takes, and which instance serves them.
#include "api.h"
#include "tile_cost.h"
#include "tma.h"

namespace mft::cuda {

// score_grad_sm90_bf16.cu and score_grad_sm90_fp16.cu
std::string score_grad_sm90_bf16(const ScoreGrad&, const Device&);
std::string score_grad_sm90_fp16(const ScoreGrad&, const Device&);

namespace {

std::string refusal_of_size(const std::string& name, int64_t size, int64_t multiple) {
  if (size >= 1 && size <= kLargestTmaSize && size % multiple == 0) return "";
  return name + " must be 1 to 2^30" + (multiple > 1 ? " and a multiple of " + std::to_string(multiple) : "") +
         ", got " + std::to_string(size);
}

}  // namespace

std::string refusal_sm90(const ScoreGrad& problem) {
  const Matrix& weight = problem.weight;
  const Type type = weight.type;
  if (type == Type::kFloat32) return "weight must be bf16 or fp16, got fp32";
  if (problem.d_weight.data != nullptr) return "d_weight must not be wanted, this kernel computes d_scores alone";
  if (problem.d_scores.data == nullptr) return "d_scores must be wanted, got none";
  if (problem.d_scores.type != Type::kFloat32 && problem.d_scores.type != type) {
    return "d_scores must be fp32 or of weight's type, got the other 16-bit float";
  }
  for (const std::string& refusal :
       {refusal_of_size("tokens", problem.x.rows, 1), refusal_of_size("out_features", weight.rows, 8),
        refusal_of_size("in_features", weight.columns, 8), refusal_of_tma("grad_output", problem.grad_output),
        refusal_of_tma("x", problem.x), weight.data != nullptr ? refusal_of_tma("weight", weight) : "",
        refusal_of_tma("d_scores", problem.d_scores)}) {
    if (!refusal.empty()) return refusal;
  }
  const Sign& sign = problem.sign;
  return sign.words == nullptr && sign.scores.data != nullptr ? refusal_of_tma("scores", sign.scores) : "";
}

// The tiles are those of the kernel in score_grad_sm90.cuh.
Plan plan_sm90(const ScoreGrad& problem, const Device& device) {
  constexpr int kRows = 128, kColumns = 256, kDepth = 64, kCluster = 2, kStages = 4;
  Jobs jobs;
  jobs.count = quotient(problem.weight.rows, kCluster * kRows) * quotient(problem.weight.columns, kColumns);
  jobs.steps = quotient(problem.x.rows, kDepth);
  jobs.multiply_adds = kRows * kColumns * kDepth;
  jobs.read = 2 * kDepth * (kRows + kColumns / kCluster);
  jobs.written = kEpilogueBytes * kRows * kColumns;
  const double busy = busy_cycles(jobs, std::max(1, device.multiprocessors / kCluster), 1, kStages, kWgmma,
                                  rates_of(device.capability).l2);
  return {launch_cycles(busy, bytes_of(problem), device), kDepth};
}

std::string score_grad_sm90(const ScoreGrad& problem, const Device& device) {
  const std::string refusal = refusal_sm90(problem);
  if (!refusal.empty()) return refusal;
  return problem.weight.type == Type::kBFloat16 ? score_grad_sm90_bf16(problem, device)
                                                : score_grad_sm90_fp16(problem, device);
}

}  // namespace mft::cuda
