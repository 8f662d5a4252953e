// The choice of a path for a product: the kernels for few tokens, a GEMM with the mask fused in, or slabs through
// torch's GEMM.
//
//   time of a path = max(reading, work) + call
//     reading   the weight's bytes, as fast as memory gives them
//     work      the processing of those bytes, of the mask's bytes, of each product of two numbers and of each operand
//               number
//
// The costs were fitted to measurements, by instruction set, format, product and path (choice_costs.inl). The number of
// threads is not part of the model, so it changes no bit of a result.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "row_kernels.h"

namespace mft {

enum class Path { kAuto, kFew, kFused, kSlabs };
enum class Product { kForward, kGradX, kGradScores };

// A product to compute: M tokens, N out_features, K in_features.
struct Call {
  Product product;
  Format format;
  int64_t tokens, rows, columns;
  // Bytes of memory traffic per element of the weight: the weight, its mask or sign, and its gradient as often as it is
  // read or written.
  double weight_bytes;
  double mask_bytes;  // those of the mask or sign, which cost more than reading
};

// Returns Call::weight_bytes. The bytes of an element are: in the weight (0 without that factor), in the mask or sign,
// in the gradient.
double weight_bytes(Product product, int weight, double mask, int out = 0, bool accumulate = false);

// "auto", "few", "fused" or "slabs". Throws std::invalid_argument for another name.
Path path_of(const std::string& name);
const char* name_of(Path path);

// "forward", "d_x" or "d_scores"; "float32", "bfloat16" or "float16". Throw std::invalid_argument for another name.
Product product_of(const std::string& name);
Format format_of(const std::string& name);

// The amount of work: bytes of the weight, those of them in its mask, products of two numbers, numbers of the operands.
using Work = std::array<double, 4>;
Work work_of(const std::string& capability, const Call& call, Path path);

// Returns the time that the model predicts for a path on two threads; infinity if there is no such path.
double microseconds(const std::string& capability, const Call& call, Path path);

// Returns the paths that an instruction set has for this call, fastest first.
std::vector<Path> paths(const std::string& capability, const Call& call);

// Returns `asked`, or the fastest path if that is kAuto. Throws std::invalid_argument if the call has no such path.
Path choose(const std::string& capability, const Call& call, Path asked);

}  // namespace mft
