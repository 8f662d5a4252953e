// product_sm90: which products it takes, and the choice of the dtype's file.
#include "api.h"
#include "tma.h"

namespace mft::cuda {

Plan plan_sm90_bf16(const Product&, const Device&);
Plan plan_sm90_fp16(const Product&, const Device&);
std::string product_sm90_bf16(const Product&, const Device&);
std::string product_sm90_fp16(const Product&, const Device&);

namespace {

std::string refusal_of_words(const uint32_t* words, int64_t rows, int64_t columns) {
  const int64_t row_words = (columns + 31) / 32;
  return refusal_of_tma("the packed mask",
                        {const_cast<uint32_t*>(words), Type::kFloat32, rows, row_words, row_words});
}

}  // namespace

std::string refusal_sm90(const Product& p) {
  if (p.weight.type == Type::kFloat32) return "weight must be of a 16-bit type";
  if (p.out.rows == 0 || p.out.columns == 0 || p.in.columns == 0) return "the product is empty";
  for (const auto& [name, matrix] : {std::pair{"weight", &p.weight}, {"the input", &p.in}, {"the output", &p.out}}) {
    if (std::string reason = refusal_of_tma(name, *matrix); !reason.empty()) return reason;
  }
  if (p.keep.words != nullptr) return refusal_of_words(p.keep.words, p.weight.rows, p.weight.columns);
  if (p.keep.scores.type != p.weight.type) return "scores must be of weight's type, or packed";
  if (p.transposed && p.keep.threshold_stride != 0) return "thresholds by row must be packed for d_x";
  return refusal_of_tma("scores", p.keep.scores);
}

Plan plan_sm90(const Product& p, const Device& device) {
  return p.weight.type == Type::kBFloat16 ? plan_sm90_bf16(p, device) : plan_sm90_fp16(p, device);
}

std::string product_sm90(const Product& p, const Device& device) {
  return p.weight.type == Type::kBFloat16 ? product_sm90_bf16(p, device) : product_sm90_fp16(p, device);
}

}  // namespace mft::cuda
