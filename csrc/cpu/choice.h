// By which path a product is made: the kernels for few tokens, fused into a GEMM, or slabs through torch's GEMM.
//
//   time of a path = max(reading, work) + call
//     reading   the weight's bytes, as fast as memory gives them
//     work      what is done to those bytes, to those of the mask, to each product of two numbers and each number of the
//               operands
//
// What each costs was measured, by instruction set, format, product and path (choice_costs.inl). The number of threads
// does not enter, so that it changes no bit of a result.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "row_kernels.h"

namespace mft {

enum class Path { kAuto, kFew, kFused, kSlabs };
enum class Product { kForward, kGradX, kGradScores };

// A product to be made: M tokens, N out_features, K in_features.
struct Call {
  Product product;
  Format format;
  int64_t tokens, rows, columns;
  // Of memory for each element of the weight: itself, its mask or sign, its gradient as often as it is read or written.
  double weight_bytes;
  double mask_bytes;  // of these, of its mask or sign, which costs more than to be read
};

// Call::weight_bytes, of an element's bytes: in the weight, 0 without that factor; in the mask or sign; in the gradient.
double weight_bytes(Product product, int weight, double mask, int out = 0, bool accumulate = false);

// "auto", "few", "fused" or "slabs". Throws std::invalid_argument for another name.
Path path_of(const std::string& name);
const char* name_of(Path path);

// "forward", "d_x" or "d_scores"; "float32", "bfloat16" or "float16". Throw std::invalid_argument for another name.
Product product_of(const std::string& name);
Format format_of(const std::string& name);

// How much there is to do: bytes of the weight, of these of its mask, products of two numbers, numbers of the operands.
using Work = std::array<double, 4>;
Work work_of(const std::string& capability, const Call& call, Path path);

// How long a path takes by the model, on two threads; endless where there is no such path.
double microseconds(const std::string& capability, const Call& call, Path path);

// The paths that an instruction set has for this call, the fastest first.
std::vector<Path> paths(const std::string& capability, const Call& call);

// `asked`, or the fastest where that is kAuto. Throws std::invalid_argument if the call has no such path.
Path choose(const std::string& capability, const Call& call, Path asked);

}  // namespace mft
