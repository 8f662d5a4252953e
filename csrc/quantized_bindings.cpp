// The ops of namespace mft_cpu for quantised weights (cpu/decode.h), and the op that decodes them to a dense matrix.
#include <algorithm>

#include "cpu/capability.h"
#include "cpu/parallel.h"
#include "operands.h"
#include "text.h"

namespace mft::ops {
namespace {

// Return a quantised weight. Its codes index a table of `levels`, or are int8. `absmax` is fp32, or, for a table, the
// four tensors of bitsandbytes' double quantisation: the codes of absmax, their fp32 absmax, the map of the codes, the
// offset.
mft::Quantized quantized(const Tensor& codes, const std::vector<Tensor>& absmax, int64_t rows, int64_t columns,
                         const std::optional<Tensor>& levels, int64_t block) {
  const auto check = [](const Tensor& t, ScalarType type, int64_t numel, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.is_cpu() && t.numel() == numel, name,
                    " must be contiguous on the CPU, of its kind's dtype and of ", numel, " elements");
    return t.const_data_ptr();
  };
  const auto blocks_of = [](int64_t numel, int64_t block) { return (numel + block - 1) / block; };
  const bool table = levels.has_value();
  STD_TORCH_CHECK(table ? block > 0 : block == 0, "block must be how many weights of a table share an absmax, else 0");
  const int64_t numel = rows * columns, blocks = table ? blocks_of(numel, block) : rows;
  STD_TORCH_CHECK(rows >= 0 && columns >= 0 && (absmax.size() == 1 || (table && absmax.size() == 4)),
                  "absmax must be one tensor, or for a table the four of double quantisation");
  mft::Quantized found{block, rows, columns, nullptr, nullptr, nullptr, nullptr, nullptr, 0, {}};
  if (table) {
    const void* given = check(*levels, ScalarType::Float, mft::kLevels, "levels");
    std::copy_n(static_cast<const float*>(given), mft::kLevels, found.levels);
  }
  found.codes = check(codes, table ? ScalarType::Byte : ScalarType::Char, table ? (numel + 1) / 2 : numel, "codes");
  if (absmax.size() == 1) {
    found.absmax = static_cast<const float*>(check(absmax[0], ScalarType::Float, blocks, "absmax"));
  } else {
    found.absmax_codes = static_cast<const uint8_t*>(check(absmax[0], ScalarType::Byte, blocks, "absmax's codes"));
    found.nested = static_cast<const float*>(
        check(absmax[1], ScalarType::Float, blocks_of(blocks, mft::kNestedBlock), "absmax's absmax"));
    found.map = static_cast<const float*>(check(absmax[2], ScalarType::Float, 256, "absmax's map"));
    found.offset = *static_cast<const float*>(check(absmax[3], ScalarType::Float, 1, "absmax's offset"));
  }
  return found;
}

// Return the mask of a weight (rows, columns): its bits, or one that keeps every weight, whose words are in `all`.
MaskSource bits_or_all(const std::optional<Tensor>& packed, std::vector<uint32_t>& all, int64_t rows, int64_t columns) {
  if (!packed.has_value()) return mft::keep_all(all, columns);
  return mft::mask_source(std::nullopt, std::nullopt, packed, false, rows, columns);
}

Tensor masked_linear_quantized(Tensor x, Tensor codes, std::vector<Tensor> absmax, std::optional<Tensor> packed,
                               std::optional<Tensor> bias, int64_t rows, int64_t columns, std::optional<Tensor> levels,
                               int64_t block, Text path) {
  const mft::Quantized weight = quantized(codes, absmax, rows, columns, levels, block);
  const Format format = mft::format_of(x, "x");
  std::vector<uint32_t> all;
  return mft::forward_of(x, {weight, mft::chosen_capability().decode, format}, bits_or_all(packed, all, rows, columns),
                         mft::bias_of(bias, rows, format), mft::path_of(path));
}

Tensor grad_x_quantized(Tensor grad_output, Tensor codes, std::vector<Tensor> absmax, std::optional<Tensor> packed,
                        int64_t rows, int64_t columns, std::optional<Tensor> levels, int64_t block, Text path) {
  const mft::Quantized weight = quantized(codes, absmax, rows, columns, levels, block);
  const Format format = mft::format_of(grad_output, "grad_output");
  std::vector<uint32_t> all;
  return mft::d_x_of(grad_output, {weight, mft::chosen_capability().decode, format},
                     bits_or_all(packed, all, rows, columns), mft::path_of(path));
}

void dequantize_(Tensor out, Tensor codes, std::vector<Tensor> absmax, std::optional<Tensor> levels, int64_t block) {
  const Matrix dense = mft::output(out, "out");
  const mft::Quantized weight = quantized(codes, absmax, dense.rows, dense.columns, levels, block);
  const mft::Decode decode = mft::chosen_capability().decode;
  mft::parallel_for(0, dense.rows, 1 + 65536 / (dense.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) decode(dense.row(r), dense.format, weight, r, 0, dense.columns);
  });
}

}  // namespace

MFT_OPS(CPU) {
  MFT_OP(masked_linear_quantized,
         "(Tensor x, Tensor codes, Tensor[] absmax, Tensor? packed, Tensor? bias, int rows, int columns, Tensor? levels, "
         "int block, str path) -> Tensor");
  MFT_OP(grad_x_quantized,
         "(Tensor grad_output, Tensor codes, Tensor[] absmax, Tensor? packed, int rows, int columns, Tensor? levels, int "
         "block, str path) -> Tensor");
  MFT_OP(dequantize_, "(Tensor(a!) out, Tensor codes, Tensor[] absmax, Tensor? levels, int block) -> ()");
}

}  // namespace mft::ops
