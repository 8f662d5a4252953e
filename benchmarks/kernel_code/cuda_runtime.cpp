// A CUDA runtime without a GPU, to link the compiled objects with. It writes each launch to stdout:
//
//   launch CAPABILITY KERNEL THREADS BYTES
//
// BYTES is the dynamic shared memory, which only the launch knows. The reader (cuda.py) checks if the GPU has it. The
// declarations are not from CUDA's headers, so that any C++ compiler works; the layouts are those of CUDA 12 and 13.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

int capability = 80;  // of the GPU that the calls see

namespace {

struct Dimensions {
  unsigned x, y, z;
};

struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    Dimensions cluster;
    char size[64];
  };
};

struct LaunchConfiguration {
  Dimensions grid, block;
  size_t shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

constexpr int kInvalidValue = 1, kInvalidFunction = 98;
constexpr int kSharedBytesAttribute = 8, kClusterAttribute = 4;  // cudaFuncAttribute..., cudaLaunchAttribute...
constexpr size_t kSharedBytesUnasked = 48 * 1024;

struct Function {
  const char* name;
  size_t shared_bytes = kSharedBytesUnasked;  // the most that a launch may ask for
};

std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> known;  // filled by initialisers in other files
  return known;
}

int launch(const void* function, const LaunchConfiguration& c) {
  const auto found = functions().find(function);
  if (found == functions().end()) return kInvalidFunction;
  unsigned cluster = 1;
  for (unsigned i = 0; i < c.attribute_count; ++i) {
    if (c.attributes[i].id == kClusterAttribute) cluster = c.attributes[i].cluster.x;
  }
  const unsigned threads = c.block.x * c.block.y * c.block.z;
  if (threads == 0 || threads > 1024 || c.grid.x == 0 || c.grid.x > 0x7fffffff || c.grid.x % cluster != 0 ||
      c.grid.y == 0 || c.grid.y > 65535 || c.grid.z == 0 || c.grid.z > 65535 || (cluster > 1 && capability < 90) ||
      c.shared_bytes > found->second.shared_bytes) {
    return kInvalidValue;
  }
  std::printf("launch %d %s %u %zu\n", capability, found->second.name, threads, c.shared_bytes);
  return 0;
}

int make_tensor_map(...) { return 0; }  // the driver's function of 12 arguments

int entry_point(const char* name, void** function) {
  *function = reinterpret_cast<void*>(&make_tensor_map);
  return std::strcmp(name, "cuTensorMapEncodeTiled") == 0 ? 0 : kInvalidValue;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  functions()[host] = {name};
}

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  if (attribute != kSharedBytesAttribute || value < 0) return kInvalidValue;
  functions()[function].shared_bytes = static_cast<size_t>(value);
  return 0;
}

int cudaLaunchKernelExC(const LaunchConfiguration* c, const void* function, void**) { return launch(function, *c); }

int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, int* result) {
  if (result != nullptr) *result = 0;
  return entry_point(name, function);
}
int cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long, int* result) {
  if (result != nullptr) *result = 0;
  return entry_point(name, function);
}

int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int error) {
  return error == kInvalidFunction ? "a function that no object registers" : "more than this GPU has or was asked for";
}
int cudaGetDevice(int* device) { return *device = 0; }
int cudaDeviceGetAttribute(int* value, int, int) {
  *value = 132;
  return 0;
}

// Behind kernel<<<...>>>, which no file of ours writes; the stubs of the compiler name them.
int __cudaGetKernel(void**, const void*) { std::abort(); }
int __cudaLaunchKernel(void*, Dimensions, Dimensions, void**, size_t, void*) { std::abort(); }
int cudaLaunchKernel(const void*, Dimensions, Dimensions, void**, size_t, void*) { std::abort(); }
int __cudaPopCallConfiguration(Dimensions*, Dimensions*, size_t*, void*) { std::abort(); }

}  // extern "C"
