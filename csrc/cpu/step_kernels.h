// A table of function pointers: an optimiser step on a run of scores, for one instruction set.
//
// mft_kernels/reference/step.py defines the formats and the arithmetic. Codes and scores equal it bit for bit.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace mft {

// The selection of the threshold reads kFixed16 as fp16.
enum class ScoreFormat : int { kFloat32 = 0, kBFloat16 = 1, kFixed16 = 2 };

constexpr Format selected_as(ScoreFormat format) {
  return format == ScoreFormat::kFloat32    ? Format::kFloat32
         : format == ScoreFormat::kBFloat16 ? Format::kBFloat16
                                            : Format::kFloat16;
}

constexpr int64_t kStepBlock = 256;   // elements that share a scale
constexpr int64_t kStepChunk = 1024;  // elements that use the words of 256 counters

// The matrices of a step. Each pointer is to the first element.
struct StepTensors {
  void* scores;
  ScoreFormat score_format;
  const void* grad;
  Format grad_format;
  const void* weight;  // nullptr: none
  Format weight_format;
  void* exp_avg;       // fp32, or uint8 codes with scales
  void* exp_avg_sq;
  float* mean_scales;  // one per block; nullptr: fp32 moments
  float* square_scales;
};

struct StepConstants {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float decay;                   // 1 - lr * weight_decay
  float minus_step_size;         // -lr / (1 - beta1^step)
  float correction;              // fp32 moments: (1 - beta2^step)^0.5, which divides the roots;
                                 // 8-bit moments: its inverse, which multiplies the roots
  float eps;
  float grad_scale;
  bool decays, scales_grad;
  bool sign;                     // multiply by sign(score)
  uint32_t seed_low, seed_high, step;
};

struct StepKernels {
  // Updates the fp32 moments of elements [begin, begin + n). begin is a multiple of kStepChunk.
  void (*moments)(const StepTensors& t, const StepConstants& c, int64_t begin, int64_t n);

  // Then updates the scores of the same elements. root (n) holds sqrt(exp_avg_sq).
  void (*scores)(const StepTensors& t, const StepConstants& c, const float* root, int64_t begin, int64_t n);

  // Updates the 8-bit moments and the scores of elements [begin, begin + n), n <= kStepChunk.
  void (*chunk)(const StepTensors& t, const StepConstants& c, int64_t begin, int64_t n);
};

const StepKernels& portable_step_kernels();
const StepKernels& avx2_step_kernels();
const StepKernels& avx512_step_kernels();

}  // namespace mft
