// The ops of namespace mft_cuda that launch Triton's kernels without Triton; mft_kernels/backends/triton/cubins.py calls them.

#include <string>
#include <vector>

#include "cubin.h"
#include "place.h"

namespace {

using mft::cuda::Place;
using torch::stable::Tensor;

void check_launch(const std::string& error) { STD_TORCH_CHECK(error.empty(), "a cubin of Triton's: ", error); }

// layout: five numbers per parameter. For a tensor map: the bytes of an element, its type, the swizzle, and the rows
// and columns of a box; else five zeros.
int64_t add_cubin(Tensor image, std::string name, int64_t warps, int64_t shared, std::vector<int64_t> layout) {
  constexpr size_t kNumbers = 5;
  STD_TORCH_CHECK(image.is_contiguous() && layout.size() % kNumbers == 0, "image must be contiguous, layout of fives");
  mft::cuda::Cubin cubin;
  const auto* bytes = static_cast<const char*>(image.const_data_ptr());
  cubin.image.assign(bytes, bytes + image.numel());
  cubin.name = name;
  cubin.warps = static_cast<unsigned>(warps);
  cubin.shared_bytes = static_cast<unsigned>(shared);
  for (size_t i = 0; i < layout.size(); i += kNumbers) {
    const auto number = [&](size_t j) { return static_cast<int>(layout[i + j]); };
    cubin.parameters.push_back({number(0), number(1), number(2), number(3), number(4)});
  }
  return mft::cuda::add_cubin(std::move(cubin));
}

// values: see cubin.h; a float is given by its bits. The memory that they point to must live until the kernel is
// launched, as for any kernel on a torch stream.
void launch_cubin(int64_t number, int64_t device, std::vector<int64_t> grid, std::vector<int64_t> values) {
  STD_TORCH_CHECK(grid.size() == 3, "grid must have 3 numbers");
  const size_t wanted = mft::cuda::cubin_values(number);
  STD_TORCH_CHECK(values.size() == wanted, "a launch of this cubin takes ", wanted, " values, got ", values.size());
  const Place place(static_cast<int>(device));
  const auto size = [&](size_t i) { return static_cast<unsigned>(grid[i]); };
  check_launch(mft::cuda::launch_cubin(number, place.index, place.device.stream, {size(0), size(1), size(2)},
                                       values.data()));
}

}  // namespace

MFT_OPS(m) {
  m.def("add_cubin(Tensor image, str name, int warps, int shared, int[] layout) -> int");
  m.def("launch_cubin(int cubin, int device, int[] grid, int[] values) -> ()");
}

MFT_OPS_ON(CompositeExplicitAutograd, m) {
  m.impl("add_cubin", TORCH_BOX(&add_cubin));
  m.impl("launch_cubin", TORCH_BOX(&launch_cubin));
}
