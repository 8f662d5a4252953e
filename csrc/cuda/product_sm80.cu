// product_sm80: which of the general kernels, and what none of them takes.
#include "product_sm80.cuh"

namespace mft::cuda {

std::string product_sm80(const Product& p, const Device& device) {
  if (p.weight.type == Type::kFloat32) return "weight must be bf16 or fp16, got fp32; use the triton backend";
  if (std::max({p.out.rows, p.weight.rows, p.weight.columns}) > sm80::kLongestSide) {
    return "x and weight must have sides below 2^31 - 2^16; split them";
  }
  if (p.out.rows == 0 || p.out.columns == 0) return "";
  if (p.weight.type == Type::kBFloat16) return sm80::product_of<BFloat16>(p, device);
  return sm80::product_of<Float16>(p, device);
}

int64_t product_workspace(const Product& p, const Device& device) {
  if (p.out.rows == 0 || p.out.columns == 0) return 0;
  const int64_t parts = sm80::parts_of(p, device), tiles = sm80::tiles_of(p.out.columns, sm80::kTileFeatures);
  return parts > 1 ? parts * p.out.rows * tiles * sm80::kTileFeatures * 4 : 0;
}

}  // namespace mft::cuda
