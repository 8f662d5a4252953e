// Where an op runs: a device, which is current while the Place lives, and its stream. Nothing here waits, so CUDA
// graphs may record the launches.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <charconv>
#include <cstdlib>
#include <cstring>

#include "../registration.h"
#include "api.h"

#ifdef MFT_CUDA_ON_HOST  // a test's library: its kernels run on the host, its ops take CPU tensors
#define MFT_KEY CPU
#else
#define MFT_KEY CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
// A CPU build of torch lacks this function. As a weak symbol, it does not keep the library from loading there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace mft::cuda {

// MFT_CUDA_CAPABILITY=80 runs an older GPU's kernels, for tests and comparisons.
inline int chosen_capability(int capability) {
  const char* asked = std::getenv("MFT_CUDA_CAPABILITY");
  if (asked) std::from_chars(asked, asked + std::strlen(asked), capability);  // atoi would require glibc 2.38
  return capability;
}

#ifdef MFT_CUDA_ON_HOST

struct Place {
  Device device{nullptr, 4, chosen_capability(80)};
  int index;
  explicit Place(const torch::stable::Tensor& t) : index(t.get_device()) {}
};

#else

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error), "; see mft_kernels.backend_report()");
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

struct Place {
  Device device;
  int index;
  torch::stable::accelerator::DeviceGuard guard;

  explicit Place(const torch::stable::Tensor& t) : index(t.get_device()), guard(index) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "torch must be built with CUDA to launch a kernel");
    check(cudaSetDevice(index));  // this library has a CUDA runtime of its own
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &device.stream));
    device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
    device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
    device.l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
    device.capability = chosen_capability(10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                                          attribute(cudaDevAttrComputeCapabilityMinor, index));
  }
};

#endif

}  // namespace mft::cuda
