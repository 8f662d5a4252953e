// Which instruction sets this machine and this build offer, and which one a call takes.
#pragma once

#include <string>

#include "row_kernels.h"
#include "step_kernels.h"

namespace mft {

struct FusedLinear;

struct Capability {
  const char* name;
  const RowKernels* rows;
  const StepKernels* step;
  const FusedLinear* bfloat16;  // for bf16 weights, instead of slabs and torch's GEMM; nullptr: none
};

// The best one, or the one that the environment variable MFT_CPU_CAPABILITY names (read at every call).
// Throws std::runtime_error if it names one that is unknown or cannot run here.
const Capability& chosen_capability();

// All that can run here, best first, with commas.
std::string available_capabilities();

}  // namespace mft
