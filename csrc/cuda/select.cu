// kept_threshold: the launches that find the threshold.
#include "select.cuh"

#include <algorithm>

#include "api.h"
#include "clear.h"

namespace mft::cuda {
namespace {

// Words of the workspace: Found, a counter of finished blocks for each pass, and the counts of each pass.
constexpr int64_t kFoundWords = 4, kHeaderWords = 16;
static_assert(sizeof(Found) <= 4 * kFoundWords);

// Return whether a block may use the 128 KiB of shared memory that 32,768 counts take. On sm_86, 89 and 120 it may not.
bool has_room(int capability) {
  return capability == 80 || capability == 87 || (capability >= 90 && capability < 120);
}

// Launch the passes one after the other.
template <class... Kernels>
std::string run(const Select& s, const Device& device, uint32_t infinity) {
  static_assert(sizeof...(Kernels) <= kHeaderWords - kFoundWords);
  uint32_t* const workspace = static_cast<uint32_t*>(s.workspace);
  SelectArguments arguments;
  arguments.scores = static_cast<const char*>(s.scores);
  arguments.count = s.count;
  arguments.rank = s.count == 0 ? 0 : static_cast<uint32_t>(s.count - std::max<int64_t>(s.k, 1) + 1);
  arguments.infinity = infinity;
  arguments.none = s.k == 0;
  arguments.found = reinterpret_cast<Found*>(workspace);
  arguments.blocks_done = workspace + kFoundWords;
  arguments.counts = workspace + kHeaderWords;
  arguments.threshold = s.threshold;

  std::string error = clear(workspace, kHeaderWords + (Kernels::kBins + ...), device.stream);
  const auto pass = [&](auto kernel) {
    using Kernel = decltype(kernel);
    if (!error.empty()) return;
    const int64_t block_bytes = Kernel::kThreads * Kernel::kLoads * 16;
    const int64_t blocks = (s.count * bytes_of(s.type) + block_bytes - 1) / block_bytes;
    LaunchShape shape;
    shape.x = std::max<int64_t>(1, std::min<int64_t>(blocks, device.multiprocessors));
    shape.shared_bytes = Kernel::kSharedBytes;
    error = isa::launch<Kernel>(shape, device.stream, arguments);
    ++arguments.blocks_done;
    arguments.counts += Kernel::kBins;
  };
  (pass(Kernels{}), ...);
  return error;
}

std::string run(const Select& s, const Device& device) {
  if (s.type == Type::kFloat32) {
    constexpr uint32_t kInfinity = 0x7f800000;
    return s.magnitude ? run<SelectKernel<uint32_t, true, 20, 11>, SelectKernel<uint32_t, true, 10, 10>,
                             SelectKernel<uint32_t, true, 0, 10>>(s, device, kInfinity)
                       : run<SelectKernel<uint32_t, false, 21, 11>, SelectKernel<uint32_t, false, 10, 11>,
                             SelectKernel<uint32_t, false, 0, 10>>(s, device, kInfinity);
  }
  const uint32_t infinity = s.type == Type::kBFloat16 ? 0x7f80 : 0x7c00;
  if (!s.magnitude) {
    return run<SelectKernel<uint16_t, false, 5, 11>, SelectKernel<uint16_t, false, 0, 5>>(s, device, infinity);
  }
  if (has_room(device.capability)) return run<SelectKernel<uint16_t, true, 0, 15>>(s, device, infinity);
  return run<SelectKernel<uint16_t, true, 4, 11>, SelectKernel<uint16_t, true, 0, 4>>(s, device, infinity);
}

std::string refusal(const Select& s) {
  if (s.count < 0 || s.count >= int64_t{1} << 32) {
    return "scores are counted in 32 bits and must be fewer than 2^32, got " + std::to_string(s.count) +
           "; use the triton backend";
  }
  if (s.k < 0 || s.k > s.count) {
    return "k must lie between 0 and the " + std::to_string(s.count) + " scores, got " + std::to_string(s.k);
  }
  return "";
}

}  // namespace

int64_t select_workspace(Type type) {
  const int64_t counts = type == Type::kFloat32 ? 2048 + 2048 + 1024 : 32768;
  return 4 * (kHeaderWords + counts);
}

std::string kept_threshold(const Select& s, const Device& device) {
  const std::string error = refusal(s);
  return error.empty() ? run(s, device) : error;
}

}  // namespace mft::cuda
