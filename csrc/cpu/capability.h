// Which instruction sets this machine and this build offer, and which one a call takes.
#pragma once

#include <string>

#include "decode.h"
#include "few_tokens.h"
#include "row_kernels.h"
#include "step_kernels.h"

namespace mft {

struct Gemm;

struct Capability {
  const char* name;
  const RowKernels* rows;
  const StepKernels* step;
  const FewKernels* few;
  Decode decode;
  const Gemm* gemms[3];  // by Format, of what the mask is fused with; nullptr: none, slabs go through torch's GEMM
};

// The best one, or the one that the environment variable MFT_CPU_CAPABILITY names (read at every call).
// Throws std::runtime_error if it names one that is unknown or cannot run here.
const Capability& chosen_capability();

// All that can run here, best first, with commas; last the emulation of AMX, which is there to be tested.
std::string available_capabilities();

// A line "name: why not" for each that is better than the best one.
std::string missing_capabilities();

}  // namespace mft
