// pack_mask and pack_signs: choose the kernel for the type of the scores.
#include "pack.cuh"

#include <algorithm>

#include "clear.h"

namespace mft::cuda {
namespace {

template <class T, PackedBit kBit>
std::string run(const PackArguments& arguments, const Device& device) {
  using Kernel = PackKernel<T, kBit>;
  const int64_t groups = (arguments.columns + 1023) / 1024;
  const int64_t blocks = (arguments.rows * groups + Kernel::kWarps - 1) / Kernel::kWarps;
  if (blocks == 0) return "";
  LaunchShape shape;
  shape.x = std::min<int64_t>(blocks, 8 * device.multiprocessors);
  shape.shared_bytes = Kernel::kSharedBytes;
  return isa::launch<Kernel>(shape, device.stream, arguments);
}

template <PackedBit kBit>
std::string run(const Matrix& scores, PackArguments arguments, const Device& device) {
  arguments.scores = static_cast<const char*>(scores.data);
  arguments.rows = scores.rows, arguments.columns = scores.columns, arguments.stride = scores.stride;
  switch (scores.type) {
    case Type::kFloat32:
      return run<float, kBit>(arguments, device);
    case Type::kBFloat16:
      return run<BFloat16, kBit>(arguments, device);
    default:
      return run<Float16, kBit>(arguments, device);
  }
}

}  // namespace

std::string pack_mask(const PackMask& p, const Device& device) {
  PackArguments arguments = {};
  arguments.words = p.words;
  arguments.thresholds = static_cast<const char*>(p.keep.thresholds);
  arguments.threshold_stride = p.keep.threshold_stride;
  return p.keep.magnitude ? run<PackedBit::kKeptByMagnitude>(p.keep.scores, arguments, device)
                          : run<PackedBit::kKeptByValue>(p.keep.scores, arguments, device);
}

std::string pack_signs(const PackSigns& p, const Device& device) {
  std::string error = clear(p.zeros, 2, device.stream);
  if (!error.empty()) return error;
  PackArguments arguments = {};
  arguments.words = p.words;
  arguments.zeros = p.zeros;
  return run<PackedBit::kPositive>(p.scores, arguments, device);
}

}  // namespace mft::cuda
