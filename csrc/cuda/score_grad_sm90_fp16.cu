// d_scores on Hopper from fp16 grad_output, x and weight.
#include "score_grad_sm90.cuh"

namespace mft::cuda {

std::string score_grad_sm90_fp16(const ScoreGrad& problem, const Device& device) {
  return problem.d_scores.type == Type::kFloat32 ? ScoreGradSm90<Float16, float>::launch(problem, device)
                                                 : ScoreGradSm90<Float16, Float16>::launch(problem, device);
}

}  // namespace mft::cuda
