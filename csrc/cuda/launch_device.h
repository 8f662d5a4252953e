// How isa_device.h and CUTLASS's d_scores launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <string>

namespace mft::cuda {

// Let a kernel have all the shared memory that the current device gives to one block. A limit of each launch's own could
// be lowered by another thread before that launch. So it is set once per kernel and device, to the same value by all.
template <class Kernel, class Arguments>
cudaError_t raise_shared_limit(void (*function)(Arguments)) {
  constexpr int kDevices = 64;  // on any beyond these, it is set at every launch
  static std::atomic<bool> raised[kDevices];
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess && device < kDevices && raised[device]) return status;
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) {
    const auto* entry = reinterpret_cast<const void*>(function);
    status = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (status == cudaSuccess && device < kDevices) raised[device] = true;
  return status;
}

// Launch the entry of `Kernel` on the current device, without waiting, in clusters of so many blocks. Return "" or an
// error text. `shape` has no attributes yet.
template <class Kernel, class Arguments>
std::string launch_entry(void (*function)(Arguments), cudaLaunchConfig_t shape, dim3 cluster, const Arguments& arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  shape.attrs = &attribute;
  shape.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 1 : 0;
  // More than 48 KiB must be requested.
  cudaError_t status = shape.dynamicSmemBytes > 48 * 1024 ? raise_shared_limit<Kernel>(function) : cudaSuccess;
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&shape, function, arguments);
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // reported here, so clear it for later calls
  return cudaGetErrorString(status);
}

}  // namespace mft::cuda
