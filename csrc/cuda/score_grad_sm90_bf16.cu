// d_scores on Hopper from bf16 grad_output, x and weight.
#include "score_grad_sm90.cuh"

namespace mft::cuda {

std::string score_grad_sm90_bf16(const ScoreGrad& problem, const Device& device) {
  return problem.d_scores.type == Type::kFloat32 ? ScoreGradSm90<BFloat16, float>::launch(problem, device)
                                                 : ScoreGradSm90<BFloat16, BFloat16>::launch(problem, device);
}

}  // namespace mft::cuda
