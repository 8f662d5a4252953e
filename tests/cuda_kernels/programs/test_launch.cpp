// launch_device.h over a runtime of CUDA that is written here: a launch fails if it needs more shared memory than its
// kernel may have on the device at that moment.
#include <cstdio>
#include <map>

#include "launch_device.h"

namespace {

constexpr int kMost = 227 * 1024;
int current = 0, settings = 0;
std::map<int, int> limits;       // by device
void (*meanwhile)() = nullptr;  // what another thread does between a launch's preparation and its start

void kernel(int) {}
struct Kernel {};

std::string launch(int shared_bytes) {
  cudaLaunchConfig_t shape = {};
  shape.dynamicSmemBytes = shared_bytes;
  return mft::cuda::launch_entry<Kernel>(&kernel, shape, dim3(1), 0);
}

int expect(const char* name, bool holds) {
  if (!holds) std::printf("%s\n", name);
  return !holds;
}

}  // namespace

extern "C" {
cudaError_t CUDARTAPI cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "refused"; }
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = kMost, cudaSuccess; }
cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  ++settings;
  limits[current] = value;
  return value > kMost ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* shape, const void*, void**) {
  if (auto other = meanwhile) meanwhile = nullptr, other();
  const int limit = limits.count(current) ? limits[current] : 48 * 1024;
  return shape->dynamicSmemBytes > static_cast<size_t>(limit) ? cudaErrorInvalidValue : cudaSuccess;
}
}

int main() {
  int wrong = expect("little shared memory needs no limit", launch(48 * 1024).empty() && settings == 0);
  meanwhile = [] { launch(64 * 1024); };
  wrong += expect("a smaller launch of another thread takes nothing away", launch(200 * 1024).empty());
  current = 1;
  wrong += expect("each device has a limit", launch(200 * 1024).empty() && launch(64 * 1024).empty());
  wrong += expect("the limit is set once per device", settings == 2);
  wrong += expect("more than the device has is refused", launch(kMost + 1) == "refused");
  return wrong;
}
