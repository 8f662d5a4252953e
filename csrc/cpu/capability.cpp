// Which instruction sets this machine and this build offer, and which one a call takes.
#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "fused_linear.h"

namespace mft {
namespace {

std::vector<Capability> detect() {
  std::vector<Capability> found;
#if defined(MFT_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(MFT_DOT_BFLOAT16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    found.push_back({"avx512_bf16", &avx512_row_kernels(), &avx512_step_kernels(), &fused_linear()});
  }
#endif
  if (avx512) found.push_back({"avx512", &avx512_row_kernels(), &avx512_step_kernels(), nullptr});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back({"avx2", &avx2_row_kernels(), &avx2_step_kernels(), nullptr});
  }
#endif
  found.push_back({"portable", &portable_row_kernels(), &portable_step_kernels(), nullptr});
  return found;
}

const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> found = detect();
  return found;
}

}  // namespace

const Capability& chosen_capability() {
  const char* wanted = std::getenv("MFT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return capabilities().front();
  for (const Capability& capability : capabilities()) {
    if (capability.name == std::string(wanted)) return capability;
  }
  throw std::runtime_error("MFT_CPU_CAPABILITY must be one of " + available_capabilities() + " on this machine, got '" +
                           wanted + "'; unset it for the best one");
}

std::string available_capabilities() {
  std::string names;
  for (const Capability& capability : capabilities()) {
    if (!names.empty()) names += ",";
    names += capability.name;
  }
  return names;
}

}  // namespace mft
