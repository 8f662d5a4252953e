// torch's own GEMM and square root on borrowed memory, through the dispatcher.
#include "torch_matmul.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

namespace mft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType scalar_type(Format format) {
  return format == Format::kFloat32    ? ScalarType::Float
         : format == Format::kBFloat16 ? ScalarType::BFloat16
                                       : ScalarType::Half;
}

// Returns a view of borrowed memory. It requires no gradient, even if the tensor that owns the memory does.
Tensor view(const Matrix& m) {
  const std::array<int64_t, 2> sizes{m.rows, m.columns}, strides{m.row_stride, m.column_stride};
  return torch::stable::from_blob(m.data, {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type(m.format));
}

Tensor view(const void* data, Format format, int64_t n) {
  const int64_t stride = 1;
  return torch::stable::from_blob(const_cast<void*>(data), {&n, 1}, {&stride, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type(format));
}

template <size_t kArguments>
void call(const char* op, std::array<StableIValue, kArguments> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the returned reference, and drops it
}

}  // namespace

void torch_matmul(const Matrix& out, const Matrix& a, const Matrix& b) {
  using torch::stable::detail::from;
  call<3>("aten::mm", {from(view(a)), from(view(b)), from(view(out))});
}

void torch_linear(const Matrix& out, const Matrix& x, const Matrix& weight, const void* bias) {
  using torch::stable::detail::from;
  std::optional<Tensor> b;
  if (bias != nullptr) b = view(bias, out.format, out.columns);
  call<4>("aten::linear", {from(view(x)), from(view(weight)), from(b), from(view(out))});
}

void torch_sqrt(float* out, const float* in, int64_t n) {
  using torch::stable::detail::from;
  call<2>("aten::sqrt", {from(view(in, Format::kFloat32, n)), from(view(out, Format::kFloat32, n))});
}

}  // namespace mft
