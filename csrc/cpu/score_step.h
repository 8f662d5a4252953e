// One optimiser step on a matrix of scores, on all threads; counts the new scores in the same pass.
#pragma once

#include "step_kernels.h"

namespace mft {

// Steps n elements. If k >= 0, returns the k-th largest score as bits (see kth_largest()), else 0. near:
// the bits of a threshold that it is expected to be close to, which saves a pass; or nullptr.
uint32_t score_step(const StepKernels& kernels, const StepTensors& t, const StepConstants& c, int64_t n, int64_t k,
                    bool magnitude, const void* near);

}  // namespace mft
