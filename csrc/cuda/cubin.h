// Kernels that Triton has compiled ahead of time: kept as cubins, loaded once a device, launched by their own parameters.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mft::cuda {

// A parameter of a kernel: a tensor map, made for each launch from a matrix of which it reads boxes; or plain bits.
struct Parameter {
  int element_bytes = 0, element_type = 0, swizzle = 0, rows = 0, columns = 0;  // of a map and its box; else 0

  bool is_map() const { return element_bytes > 0; }
  // Values of a launch that it takes: its bits, or address, rows, columns and elements from row to row.
  size_t values() const { return is_map() ? 4 : 1; }
};

struct Cubin {
  std::vector<char> image;
  std::string name;
  unsigned warps = 0, shared_bytes = 0;
  std::vector<Parameter> parameters;
};

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// Its number, by which it is launched from then on; it stays for as long as the process.
int64_t add_cubin(Cubin cubin);

// How many values a launch of it takes.
size_t cubin_values(int64_t number);

// Launches on the device that is current. Returns what went wrong, or "". Nothing waits, but for a first launch there,
// which loads the cubin.
std::string launch_cubin(int64_t number, int device, void* stream, Grid grid, const int64_t* values);

}  // namespace mft::cuda
