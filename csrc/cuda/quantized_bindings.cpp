// The op product_quantized: a product with a quantised weight (rows, columns), nf4 or int8. absmax is one tensor, or
// the four of double quantisation: the codes of absmax, their absmax, the map of the codes, the offset.
#include <vector>

#include "operands.h"

namespace {

using mft::cuda::Place;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

mft::cuda::Quantized quantized(const Tensor& codes, const std::vector<Tensor>& absmax, const Place& place, int64_t rows,
                               int64_t columns, bool nf4) {
  const auto data = [&](const Tensor& t, ScalarType type, int64_t numel, const char* name) {
    mft::cuda::check_device(t, place, name);
    STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel, name,
                    " must be contiguous, of its kind's dtype and of ", numel, " elements");
    return mft::cuda::present(t.const_data_ptr());
  };
  const auto floats = [&](const Tensor& t, int64_t numel, const char* name) {
    return static_cast<const float*>(data(t, ScalarType::Float, numel, name));
  };
  const auto blocks_of = [](int64_t numel, int64_t block) { return (numel + block - 1) / block; };
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "rows and columns must not be negative");
  STD_TORCH_CHECK(absmax.size() == 1 || (nf4 && absmax.size() == 4),
                  "absmax must be one tensor, or the four of a doubly quantised nf4");
  const int64_t numel = rows * columns, blocks = nf4 ? blocks_of(numel, 64) : rows;
  mft::cuda::Quantized w;
  w.nf4 = nf4, w.rows = rows, w.columns = columns;
  w.codes = data(codes, nf4 ? ScalarType::Byte : ScalarType::Char, nf4 ? blocks_of(numel, 2) : numel, "codes");
  if (absmax.size() == 1) {
    w.absmax = floats(absmax[0], blocks, "absmax");
  } else {
    w.absmax_codes = static_cast<const uint8_t*>(data(absmax[0], ScalarType::Byte, blocks, "absmax's codes"));
    w.nested = floats(absmax[1], blocks_of(blocks, 256), "absmax's absmax");
    w.map = floats(absmax[2], 256, "absmax's map");
    w.offset = floats(absmax[3], 1, "absmax's offset");
  }
  return w;
}

Tensor product_quantized(Tensor x, Tensor codes, std::vector<Tensor> absmax, std::optional<Tensor> packed,
                         std::optional<Tensor> bias, int64_t rows, int64_t columns, bool nf4, bool transposed) {
  const Place place(x);
  mft::cuda::QuantizedProduct p;
  p.in = mft::cuda::weight_of(x, place, "x");
  p.weight = quantized(codes, absmax, place, rows, columns, nf4);
  p.transposed = transposed;
  mft::cuda::check_size(p.in, p.in.rows, transposed ? rows : columns, "x");
  const mft::cuda::Matrix like{nullptr, p.in.type, rows, columns, columns};
  if (packed.has_value()) p.words = mft::cuda::words(*packed, place, like, "packed");
  STD_TORCH_CHECK(!bias.has_value() || !transposed, "bias must be for the forward product");
  p.bias = mft::cuda::bias_of(bias, place, like);
  const int64_t sizes[] = {p.in.rows, transposed ? columns : rows};
  Tensor out = torch::stable::new_empty(x, {sizes, 2});
  p.out = mft::cuda::output(out, place, "out");
  const std::optional<Tensor> workspace = mft::cuda::workspace_of(x, mft::cuda::plan_quantized(p, place.device));
  if (workspace.has_value()) p.workspace = workspace->mutable_data_ptr();
  mft::cuda::check_launch(mft::cuda::product_quantized(p, place.device));
  return out;
}

}  // namespace

MFT_OPS(m) {
  m.def(
      "product_quantized(Tensor x, Tensor codes, Tensor[] absmax, Tensor? packed, Tensor? bias, int rows, int columns, "
      "bool nf4, bool transposed) -> Tensor");
}

MFT_OPS_ON(MFT_KEY, m) { m.impl("product_quantized", TORCH_BOX(&product_quantized)); }
