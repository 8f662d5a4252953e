// Which instruction sets this machine and this build offer, and which one a call takes.
#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <vector>

#if defined(MFT_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "gemm.h"

namespace mft {
namespace {

struct Found {
  std::vector<Capability> capabilities;
  std::string missing;
};

#if defined(MFT_X86)

void miss(Found& found, const char* name, const std::string& why) {
  found.missing += std::string(name) + ": " + why + "\n";
}

// Whether the processor converts fp16. Every processor with AVX2 does, but not every compiler's
// __builtin_cpu_supports() knows the name.
bool has_f16c() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

// Returns why tiles cannot be used, or "". The kernel grants their 8 KiB of registers only to processes that ask.
std::string why_no_tiles() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  constexpr uint32_t kTile = 1u << 24, kBFloat16 = 1u << 22;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTile) == 0 || (d & kBFloat16) == 0) {
    return "the processor has no AMX";
  }
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? "" : "the kernel refused the use of AMX's registers";
#else
  return "only Linux is asked for AMX's registers";
#endif
}

#endif

Found detect() {
  Found found;
  std::vector<Capability>& all = found.capabilities;
#if defined(MFT_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const auto of_avx512 = [](const char* name, const FewKernels& few, Decode decode,
                            const Gemm& of_bfloat16) -> Capability {
    return {name,
            &avx512_row_kernels(),
            &avx512_step_kernels(),
            &few,
            decode,
            {&float32_gemm(Format::kFloat32), &of_bfloat16, &float32_gemm(Format::kFloat16)}};
  };
#if defined(MFT_AMX)
  const std::string no_tiles = bfloat16 ? why_no_tiles() : "the processor has no AVX512-BF16, which packs for it";
  if (no_tiles.empty()) {
    all.push_back(of_avx512("amx", avx512_bf16_few_kernels(), avx512_bf16_decode, amx_gemm()));
  } else {
    miss(found, "amx", no_tiles);
  }
#else
  miss(found, "amx", "the compiler that built the library does not know it");
#endif
#if defined(MFT_DOT_BFLOAT16)
  if (bfloat16) {
    all.push_back(of_avx512("avx512_bf16", avx512_bf16_few_kernels(), avx512_bf16_decode, bfloat16_gemm()));
  } else {
    miss(found, "avx512_bf16", "the processor does not have it");
  }
#else
  miss(found, "avx512_bf16", "the compiler that built the library does not know it");
#endif
  if (avx512) {
    all.push_back(of_avx512("avx512", avx512_few_kernels(), avx512_decode, float32_gemm(Format::kBFloat16)));
  } else {
    miss(found, "avx512", "the processor does not have it");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    all.push_back({"avx2", &avx2_row_kernels(), &avx2_step_kernels(), &avx2_few_kernels(), avx2_decode, {}});
  } else {
    miss(found, "avx2", "the processor does not have it");
  }
#endif
  all.push_back(
      {"portable", &portable_row_kernels(), &portable_step_kernels(), &portable_few_kernels(), portable_decode, {}});
#if defined(MFT_AMX)
  if (bfloat16) {
    all.push_back(of_avx512("amx_emulated", avx512_bf16_few_kernels(), avx512_bf16_decode, emulated_amx_gemm()));
  }
#endif
  return found;
}

const Found& found() {
  static const Found once = detect();
  return once;
}

}  // namespace

const Capability& chosen_capability() {
  const char* wanted = std::getenv("MFT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return found().capabilities.front();
  for (const Capability& capability : found().capabilities) {
    if (capability.name == std::string(wanted)) return capability;
  }
  throw std::runtime_error("MFT_CPU_CAPABILITY must be one of " + available_capabilities() + " on this machine, got '" +
                           wanted + "'; unset it for the best one");
}

std::string available_capabilities() {
  std::string names;
  for (const Capability& capability : found().capabilities) {
    if (!names.empty()) names += ",";
    names += capability.name;
  }
  return names;
}

std::string missing_capabilities() { return found().missing; }

}  // namespace mft
