// Which instruction sets this machine and this build offer, and which one a call takes.
#pragma once

#include <string>

#include "row_kernels.h"

namespace mft {

struct Capability {
  const char* name;
  const RowKernels* rows;
  bool dot_bfloat16;  // the fused bf16 products of gemm_bfloat16.h, instead of slabs and torch's GEMM
};

// The best one, or the one that the environment variable MFT_CPU_CAPABILITY names (read at every call).
// Throws std::runtime_error if it names one that is unknown or cannot run here.
const Capability& chosen_capability();

// All that can run here, best first, with commas.
std::string available_capabilities();

}  // namespace mft
