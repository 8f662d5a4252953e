// Load and launch cubins as Triton's launcher does (driver.c of its nvidia backend, 3.9). The tests launch through
// both, on a driver that records the calls.

#include "cubin.h"

#include <deque>
#include <map>
#include <mutex>

#include "driver.h"

namespace mft::cuda {
namespace {

struct Kept {
  Cubin cubin;
  size_t values = 0;
  std::map<int, CUfunction> functions;  // by device
};

std::mutex lock;
std::deque<Kept> all;  // a deque, because its elements never move

constexpr size_t kMostMaps = 8;
constexpr unsigned kSharedBytesUnasked = 48 * 1024;

std::string failed(const Driver& driver, const Cubin& cubin, const char* what, CUresult code) {
  return std::string(what) + " of " + cubin.name + ": " + driver.words(code);
}

std::string load(const Driver& driver, const Cubin& cubin, CUfunction& function) {
  CUmodule module = nullptr;
  CUresult code = driver.load(&module, cubin.image.data());
  if (code != CUDA_SUCCESS) return failed(driver, cubin, "loading", code);
  code = driver.function(&function, module, cubin.name.c_str());
  if (code != CUDA_SUCCESS) return failed(driver, cubin, "finding the code", code);
  if (cubin.shared_bytes <= kSharedBytesUnasked) return "";
  driver.set_cache(function, CU_FUNC_CACHE_PREFER_SHARED);
  const auto bytes = static_cast<int>(cubin.shared_bytes);
  code = driver.set_attribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes);
  return code == CUDA_SUCCESS ? "" : failed(driver, cubin, "shared memory", code);
}

// Drivers up to 13.1 misread maps of less than 128 KiB unless this bit is cleared. CUTLASS and Triton clear it too.
void mend(CUtensorMap& map, int driver_version, const cuuint64_t* size, cuuint64_t stride, int element_bytes) {
  constexpr int kMended = 13010;
  const uint64_t last = (size[0] - 1) * element_bytes + (size[1] - 1) * stride;
  if (driver_version <= kMended && last + 1 < 128 * 1024) map.opaque[1] &= ~(cuuint64_t{1} << 21);
}

CUresult encode(const Driver& driver, const Parameter& p, const int64_t* values, CUtensorMap& map) {
  const cuuint64_t size[] = {static_cast<cuuint64_t>(values[2]), static_cast<cuuint64_t>(values[1])};  // columns first
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(values[3]) * p.element_bytes, 0};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(p.columns), static_cast<cuuint32_t>(p.rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult code = driver.encode(
      &map, static_cast<CUtensorMapDataType>(p.element_type), 2, reinterpret_cast<void*>(values[0]), size, strides, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(p.swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  int version = 0;
  driver.version(&version);
  mend(map, version, size, strides[0], p.element_bytes);
  return code;
}

}  // namespace

int64_t add_cubin(Cubin cubin) {
  const std::lock_guard<std::mutex> guard(lock);
  all.emplace_back();
  for (const Parameter& p : cubin.parameters) all.back().values += p.values();
  all.back().cubin = std::move(cubin);
  return static_cast<int64_t>(all.size()) - 1;
}

size_t cubin_values(int64_t number) {
  const std::lock_guard<std::mutex> guard(lock);
  return all.at(static_cast<size_t>(number)).values;
}

std::string launch_cubin(int64_t number, int device, void* stream, Grid grid, const int64_t* values) {
  const Driver& driver = Driver::get();
  if (!driver.missing.empty()) return driver.missing;
  CUfunction function = nullptr;
  const Cubin* cubin = nullptr;
  {
    const std::lock_guard<std::mutex> guard(lock);
    Kept& kept = all.at(static_cast<size_t>(number));
    cubin = &kept.cubin;
    CUfunction& known = kept.functions[device];
    if (!known) {
      CUfunction found = nullptr;
      const std::string error = load(driver, *cubin, found);
      if (!error.empty()) return error;
      known = found;
    }
    function = known;
  }

  // The driver copies each parameter from its address. It copies as many bytes as the cubin says: the lowest of a
  // value.
  CUtensorMap maps[kMostMaps];
  std::vector<void*> places;
  places.reserve(cubin->parameters.size());
  size_t made = 0;
  for (const Parameter& p : cubin->parameters) {
    if (p.is_map()) {
      if (made == kMostMaps) return cubin->name + " has too many tensor maps";
      const CUresult code = encode(driver, p, values, maps[made]);
      if (code != CUDA_SUCCESS) return failed(driver, *cubin, "a tensor map", code);
      places.push_back(&maps[made++]);
    } else {
      places.push_back(const_cast<int64_t*>(values));
    }
    values += p.values();
  }

  CUlaunchConfig config = {};
  config.gridDimX = grid.x, config.gridDimY = grid.y, config.gridDimZ = grid.z;
  config.blockDimX = 32 * cubin->warps, config.blockDimY = 1, config.blockDimZ = 1;
  config.sharedMemBytes = cubin->shared_bytes;
  config.hStream = static_cast<CUstream>(stream);
  const CUresult code = driver.launch(&config, function, places.data(), nullptr);
  return code == CUDA_SUCCESS ? "" : failed(driver, *cubin, "launching", code);
}

}  // namespace mft::cuda
