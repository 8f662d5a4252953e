// The functions of NVIDIA's driver that launch a cubin. They are looked up at the first launch, so the library loads
// without a driver.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <string>

namespace mft::cuda {

struct Driver {
  std::string missing;  // why there is none, or ""
  decltype(&::cuDriverGetVersion) version = nullptr;
  decltype(&::cuGetErrorString) error_string = nullptr;
  decltype(&::cuModuleLoadData) load = nullptr;
  decltype(&::cuModuleGetFunction) function = nullptr;
  decltype(&::cuFuncSetAttribute) set_attribute = nullptr;
  decltype(&::cuFuncSetCacheConfig) set_cache = nullptr;
  decltype(&::cuTensorMapEncodeTiled) encode = nullptr;
  decltype(&::cuLaunchKernelEx) launch = nullptr;

  static const Driver& get() {
    static const Driver found;
    return found;
  }

  std::string words(CUresult code) const {
    const char* text = nullptr;
    error_string(code, &text);
    return text ? text : "error " + std::to_string(code);
  }

 private:
  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);  // the one that torch has loaded, if any
    if (!library) {
      missing = "no NVIDIA driver: libcuda.so.1 does not load";
      return;
    }
    find(library, "cuDriverGetVersion", version);
    find(library, "cuGetErrorString", error_string);
    find(library, "cuModuleLoadData", load);
    find(library, "cuModuleGetFunction", function);
    find(library, "cuFuncSetAttribute", set_attribute);
    find(library, "cuFuncSetCacheConfig", set_cache);
    find(library, "cuTensorMapEncodeTiled", encode);
    find(library, "cuLaunchKernelEx", launch);
  }

  template <class Function>
  void find(void* library, const char* name, Function& found) {
    found = reinterpret_cast<Function>(dlsym(library, name));
    if (!found && missing.empty()) missing = std::string("NVIDIA's driver has no ") + name + "; update it to 12.0 or newer";
  }
};

}  // namespace mft::cuda
