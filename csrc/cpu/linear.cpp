// The masked linear layer and its gradients, by slabs of the weight. Neither the whole mask nor the whole masked weight
// is ever in memory.
//
// All threads mask a slab into scratch memory (slab.h says how large it is), then torch's GEMM multiplies it. The
// forward and the score gradient cut the weight by rows, d_x by columns. So no sum is split, and no rounding is added.
// The other paths are in fused_*.cpp and few_linear.cpp; choice.cpp chooses the path. d_weight is seldom needed and has
// only this path.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "few_linear.h"
#include "fused_linear.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "slab.h"
#include "torch_matmul.h"

namespace mft {
namespace {

// Returns the length to which rows that torch's GEMM sums over must be padded. oneDNN 3.12 on AMX reads 16-bit rows up
// to the next multiple of 32 and multiplies what it finds there by 0. So a NaN or Inf between two rows, or in the next
// row, would reach the result.
int64_t filled(int64_t columns, Format format) {
  return format == Format::kFloat32 ? columns : (columns + 31) / 32 * 32;
}

// Calls f(first row, end row) on all threads.
template <typename F>
void for_rows(int64_t rows, int64_t columns, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
  parallel_for(0, rows, grain, f);
}

// A 16-bit matrix without gaps between its rows, which are padded with zeros to `columns`. It is a copy only if the
// matrix is not so already. An fp32 matrix is taken as it is.
class Dense {
 public:
  explicit Dense(const Matrix& m) : Dense(m, m.columns) {}
  Dense(const Matrix& m, int64_t columns) : matrix_(m) {
    if (m.format == Format::kFloat32 || (m.columns == columns && m.row_stride == columns)) return;
    memory_.emplace(m.rows * columns * bytes_of(m.format));
    matrix_ = {memory_->get(), m.format, m.rows, columns, columns};
    const int64_t width = bytes_of(m.format);
    for_rows(m.rows, columns, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        std::memcpy(matrix_.row(r), m.row(r), m.columns * width);
        std::memset(matrix_.row(r) + m.columns * width, 0, (columns - m.columns) * width);
      }
    });
  }
  const Matrix& get() const { return matrix_; }

 private:
  std::optional<Scratch> memory_;
  Matrix matrix_;
};

// Fills `out` with the masked weight, from row `first` and column `first_column` on.
void mask_slab(const Capability& cpu, const Matrix& out, const Weight& weight, const MaskSource& mask, int64_t first,
               int64_t first_column) {
  const int width = bytes_of(weight.format);
  for_rows(out.rows, out.columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      cpu.rows->mask(out.row(r), weight.part(first + r, first_column, out.columns, out.row(r)), width,
                     mask.row(first + r, first_column), mask.score_format, out.columns);
    }
  });
}

int64_t bytes_in(const Matrix& m) { return m.rows * m.columns * bytes_of(m.format); }

// Returns the GEMM of the fused path, if the choice fell on that path.
const Gemm& fused(const Capability& cpu, Format format) { return *cpu.gemms[static_cast<int>(format)]; }

double mask_bytes(const MaskSource& mask) { return mask.scores != nullptr ? bytes_of(mask.score_format) : 1.0 / 8; }

double sign_bytes(const SignSource& sign) {
  return sign.words != nullptr ? 1.0 / 8 : sign.scores != nullptr ? bytes_of(sign.score_format) : 0;
}

}  // namespace

MaskSource keep_all(std::vector<uint32_t>& words, int64_t columns) {
  words.assign((columns + 31) / 32, ~0u);
  if (columns % 32 != 0) words.back() = (1u << columns % 32) - 1;
  return {nullptr, Format::kFloat32, words.data(), {0, 0, false}, columns, true};
}

Call call_of(Product product, const Matrix& weight, const MaskSource& mask, int64_t tokens) {
  const double masked = mask_bytes(mask);
  return {product, weight.format, tokens, weight.rows, weight.columns,
          weight_bytes(product, bytes_of(weight.format), masked), masked};
}

Call call_of(const Matrix& out, const Matrix& weight, const SignSource& sign, bool accumulate, int64_t tokens) {
  const double signs = sign_bytes(sign);
  const int factor = weight.data != nullptr ? bytes_of(weight.format) : 0;
  return {Product::kGradScores, weight.format, tokens, weight.rows, weight.columns,
          weight_bytes(Product::kGradScores, factor, signs, bytes_of(out.format), accumulate), signs};
}

void masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Weight& weight,
                   const MaskSource& mask, const void* bias, Path path) {
  const Call call = call_of(Product::kForward, weight, mask, x.rows);
  path = choose(cpu.name, call, path);
  if (path == Path::kFew) return few_masked_linear(cpu, y, x, weight, mask, bias, {0, weight.rows});
  if (path == Path::kFused) return fused_masked_linear(fused(cpu, weight.format), y, x, weight, mask, bias);
  const int64_t rows = slab_length(weight.columns * bytes_of(weight.format), weight.rows, bytes_in(x));
  const int64_t depth = filled(weight.columns, weight.format);
  const Dense operand(x, depth);
  const Scratch scratch(rows * depth * bytes_of(weight.format));
  if (depth != weight.columns) std::memset(scratch.get(), 0, rows * depth * bytes_of(weight.format));
  for (int64_t r = 0; r < weight.rows; r += rows) {
    const int64_t n = std::min(rows, weight.rows - r);
    const Matrix slab{scratch.get(), weight.format, n, depth, depth};
    mask_slab(cpu, slab.narrow_columns(0, weight.columns), weight, mask, r, 0);
    torch_linear(y.narrow_columns(r, n), operand.get(), slab, skip(bias, r, y.format));
  }
}

void grad_x(const Capability& cpu, const Matrix& d_x, const Matrix& grad_output, const Weight& weight,
            const MaskSource& mask, Path path, const void* bias) {
  const Call call = call_of(Product::kGradX, weight, mask, grad_output.rows);
  path = choose(cpu.name, call, path);
  if (path == Path::kFew) return few_grad_x(cpu, d_x, grad_output, weight, mask, bias, {0, weight.columns});
  if (path == Path::kFused) return fused_grad_x(fused(cpu, weight.format), d_x, grad_output, weight, mask, bias);
  const int64_t columns = slab_length(weight.rows * bytes_of(weight.format), weight.columns, bytes_in(grad_output));
  const int64_t depth = filled(weight.rows, weight.format);
  const Dense operand(grad_output, depth);
  const Scratch scratch(columns * depth * bytes_of(weight.format));
  for (int64_t c = 0; c < weight.columns; c += columns) {
    const int64_t n = std::min(columns, weight.columns - c);
    const Matrix slab{scratch.get(), weight.format, depth, n, n};
    mask_slab(cpu, slab.narrow_rows(0, weight.rows), weight, mask, 0, c);
    std::memset(slab.row(weight.rows), 0, (depth - weight.rows) * n * bytes_of(weight.format));
    if (bias == nullptr) {
      torch_matmul(d_x.narrow_columns(c, n), operand.get(), slab);
    } else {
      torch_linear(d_x.narrow_columns(c, n), operand.get(), slab.transposed(), skip(bias, c, d_x.format));
    }
  }
}

void grad_weight(const Capability& cpu, const Matrix& d_weight, const Matrix& grad_output, const Matrix& x,
                 const MaskSource& mask) {
  const int64_t rows = slab_length(x.columns * bytes_of(x.format), d_weight.rows, bytes_in(x));
  for (int64_t r = 0; r < d_weight.rows; r += rows) {
    const int64_t n = std::min(rows, d_weight.rows - r);
    const Matrix slab = d_weight.narrow_rows(r, n);
    const Dense grad(grad_output.narrow_columns(r, n));
    torch_matmul(slab, grad.get().transposed(), x);
    mask_slab(cpu, slab, d_weight, mask, r, 0);
  }
}

void grad_scores(const Capability& cpu, const Matrix& out, const Matrix& grad_output, const Matrix& x,
                 const Matrix& weight, const SignSource& sign, bool accumulate, Path path, bool fresh) {
  path = choose(cpu.name, call_of(out, weight, sign, accumulate, x.rows), path);
  if (path == Path::kFused) {
    return fused_grad_scores(fused(cpu, weight.format), out, grad_output, x, weight, sign, accumulate, fresh);
  }
  const int64_t rows = slab_length(weight.columns * bytes_of(x.format), weight.rows, bytes_in(x));
  const Scratch scratch(rows * weight.columns * bytes_of(x.format));
  for (int64_t r = 0; r < weight.rows; r += rows) {
    const int64_t n = std::min(rows, weight.rows - r);
    const Matrix grad{scratch.get(), x.format, n, weight.columns, weight.columns};
    const Dense operand(grad_output.narrow_columns(r, n));
    torch_matmul(grad, operand.get().transposed(), x);
    for_rows(n, weight.columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const void* factor = weight.data != nullptr ? weight.row(r + i) : nullptr;
        cpu.rows->score_grad(out.row(r + i), out.format, grad.row(i), grad.format, factor, weight.format,
                             sign.row(r + i), sign.score_format, accumulate, weight.columns);
      }
    });
  }
}

}  // namespace mft
