// Kernels that Triton has compiled ahead of time: kept as cubins, loaded once per device, launched with their own
// parameters.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mft::cuda {

// A parameter of a kernel: plain bits, or a tensor map. Each launch makes the map for a matrix that is read in boxes.
struct Parameter {
  int element_bytes = 0, element_type = 0, swizzle = 0, rows = 0, columns = 0;  // of a map and its box; 0: plain bits

  bool is_map() const { return element_bytes > 0; }
  // How many values of a launch the parameter takes: its bits, or address, rows, columns and row stride in elements.
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

// Return the number by which the cubin is launched. It is kept until the process ends.
int64_t add_cubin(Cubin cubin);

// Return how many values a launch of the cubin takes.
size_t cubin_values(int64_t number);

// Launch on the current device. Return an error text, or "". Only the first launch on a device waits: it loads the
// cubin.
std::string launch_cubin(int64_t number, int device, void* stream, Grid grid, const int64_t* values);

}  // namespace mft::cuda
