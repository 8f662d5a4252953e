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
  const Gemm* gemms[3];  // by Format; the mask is fused into it. nullptr: none, slabs go through torch's GEMM
};

// Returns the best one, or the one that the environment variable MFT_CPU_CAPABILITY names (read at every call).
// Throws std::runtime_error if it names one that is unknown or cannot run here.
const Capability& chosen_capability();

// Returns the names of all that can run here, best first, separated by commas. The last is the emulation of AMX, which
// exists for tests.
std::string available_capabilities();

// Returns a line "name: why not" for each that is better than the best one here.
std::string missing_capabilities();

}  // namespace mft
