// NVIDIA's driver without a GPU: it records launches. Linked as libcuda.so.1, by name and by address, so that both
// Triton's launcher and ours find it. recorded() returns the launches since the last call, as JSON lines.
//
// It reads a launch's parameters as the driver does: each from its address, with the size that the cubin states
// (EIATTR_KPARAM_INFO). As in the driver, wrong calls are errors: an unknown module, more shared memory than was
// requested, a map that is not aligned.
#include <cuda.h>
#include <elf.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace {

struct Module {
  std::map<std::string, std::vector<unsigned>> sizes;  // parameter sizes of each kernel
};

struct Function {
  std::string name;
  std::vector<unsigned> sizes;
  size_t shared_bytes = 48 * 1024;  // limit of a launch
};

std::deque<Module> modules;
std::deque<Function> functions;
std::string log_text, taken;
int loads = 0;
bool is_recording = true;

std::map<std::string, std::vector<unsigned>> sizes_of(const char* image) {
  const auto& head = *reinterpret_cast<const Elf64_Ehdr*>(image);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + head.e_shoff);
  const char* names = image + sections[head.e_shstrndx].sh_offset;
  std::map<std::string, std::vector<unsigned>> found;
  for (int i = 0; i < head.e_shnum; ++i) {
    const std::string name = names + sections[i].sh_name, prefix = ".nv.info.";
    if (name.compare(0, prefix.size(), prefix) != 0) continue;
    std::map<unsigned, unsigned> sizes;
    const char* at = image + sections[i].sh_offset;
    const char* const end = at + sections[i].sh_size;
    while (at < end) {
      uint16_t size, ordinal;
      uint32_t packed;
      std::memcpy(&size, at + 2, 2);
      if (at[0] == 4 && at[1] == 0x17) {
        std::memcpy(&ordinal, at + 8, 2);
        std::memcpy(&packed, at + 12, 4);
        sizes[ordinal] = packed >> 18;
      }
      at += 4 + (at[0] == 4 ? size : 0);
    }
    for (const auto& [ordinal, bytes] : sizes) found[name.substr(prefix.size())].push_back(bytes);
  }
  return found;
}

std::string hex(const void* data, size_t size) {
  std::string text;
  char two[3];
  for (size_t i = 0; i < size; ++i) {
    std::snprintf(two, sizeof two, "%02x", static_cast<const unsigned char*>(data)[i]);
    text += two;
  }
  return text;
}

template <class... Numbers>
std::string list(Numbers... numbers) {
  std::string text;
  for (const unsigned number : {static_cast<unsigned>(numbers)...}) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

}  // namespace

extern "C" {

const char* recorded() {
  taken.swap(log_text);
  log_text.clear();
  return taken.c_str();
}
int modules_loaded() { return loads; }
void set_recording(int on) { is_recording = on != 0; }  // off, to time what happens before the launch

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  modules.push_back({sizes_of(static_cast<const char*>(image))});
  ++loads;
  *module = reinterpret_cast<CUmodule>(&modules.back());
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const auto& sizes = reinterpret_cast<Module*>(module)->sizes;
  const auto found = sizes.find(name);
  if (found == sizes.end()) return CUDA_ERROR_NOT_FOUND;
  functions.push_back({name, found->second});
  *function = reinterpret_cast<CUfunction>(&functions.back());
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Function*>(function)->shared_bytes = static_cast<size_t>(value);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction handle, void** parameters, void** extra) {
  const auto& function = *reinterpret_cast<Function*>(handle);
  if (extra || c->sharedMemBytes > function.shared_bytes) return CUDA_ERROR_INVALID_VALUE;
  if (!is_recording) return CUDA_SUCCESS;
  std::string text;
  for (size_t i = 0; i < function.sizes.size(); ++i) {
    text += (i ? ", \"" : "\"") + hex(parameters[i], function.sizes[i]) + "\"";
  }
  log_text += "{\"kernel\": \"" + function.name + "\", \"grid\": " + list(c->gridDimX, c->gridDimY, c->gridDimZ) +
              ", \"block\": " + list(c->blockDimX, c->blockDimY, c->blockDimZ) +
              ", \"shared\": " + std::to_string(c->sharedMemBytes) + ", \"attributes\": " + std::to_string(c->numAttrs) +
              ", \"stream\": " + std::to_string(reinterpret_cast<uintptr_t>(c->hStream)) + ", \"parameters\": [" + text +
              "]}\n";
  return CUDA_SUCCESS;
}

// A map of a matrix holds its arguments in its 128 bytes.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* size, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (rank != 2 || reinterpret_cast<uintptr_t>(map) % 64 != 0 || reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const cuuint64_t made[16] = {
      reinterpret_cast<uintptr_t>(address), ~cuuint64_t{0},  // a launcher may clear bit 21
      size[0], size[1], strides[0], box[0], box[1], steps[0], steps[1], type, interleave, swizzle, promotion, fill};
  std::memcpy(map, made, sizeof made);
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = code == CUDA_ERROR_NOT_FOUND ? "named symbol not found" : "invalid argument";
  return CUDA_SUCCESS;
}

// The other functions that Triton's launcher calls.
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) { return *value = 227 * 1024, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* limit, CUlimit) { return *limit = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  std::memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

}  // extern "C"
