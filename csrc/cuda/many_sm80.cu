// many_sm80: how a product with a mask per token is cut and launched, and what it does not take.
#include "many_sm80.cuh"

namespace mft::cuda {
namespace {

constexpr int64_t kTokens = 64, kMostGroups = 65535;  // tokens of a block; blocks along z

DecodeCut cut_of(const ManyProduct& p, const Device& device, bool in_parts) {
  const double weights = static_cast<double>(p.weight.rows) * p.weight.columns;
  DecodeSize size;
  size.tokens = std::min(p.out.rows, kTokens), size.groups = quotient(p.out.rows, kTokens);
  size.tiles = static_cast<int>(quotient(size.tokens, 8));
  size.features = p.out.columns, size.units = quotient(p.in.columns, kDecodePiece);
  size.weight_bytes = 2 + std::min<int64_t>(p.count, size.tokens) / 8.0;  // each mask that the tokens may use
  size.bytes = weights * size.weight_bytes * size.groups + 2.0 * p.out.rows * (p.out.columns + p.in.columns);
  size.row_bits = kDecodeRowBits;
  size.blocks = sm80::ManyKernel<BFloat16, 8, true>::kBlocksPerMultiprocessor, size.ahead = decode_ahead(true);
  size.most_slab = decode_slab(size.tiles * 8, size, device);
  return decode_cut(size, device, in_parts);
}

template <class T, int kTiles, bool kChunked>
std::string start(const ManyProduct& p, const DecodeCut& cut, const Device& device) {
  using Kernel = sm80::ManyKernel<T, kTiles, kChunked>;
  auto a = sm80::decode_arguments<sm80::ManyArguments>(p, cut);
  a.keep.row_words = static_cast<int>(quotient(p.weight.columns, 32));
  std::copy(p.masks, p.masks + p.count, a.masks);
  a.count = p.count, a.each = static_cast<int>(p.each);
  a.tasks = static_cast<const char*>(p.tasks), a.long_tasks = p.long_tasks;
  LaunchShape shape;
  shape.x = cut.blocks(p.out.columns);
  shape.y = cut.parts;
  shape.z = quotient(p.out.rows, Kernel::kTokens);
  const int tokens = static_cast<int>(std::min<int64_t>(p.out.rows, Kernel::kTokens));
  shape.shared_bytes = Kernel::shared_bytes(tokens, cut.slab_units, cut.slice_bits);
  const std::string error = isa::launch<Kernel>(shape, device.stream, a);
  if (!error.empty() || cut.parts == 1) return error;
  Product sum;
  sum.out = p.out, sum.bias = p.bias, sum.workspace = p.workspace;
  return sum_parts(sum, cut.parts, a.part_stride, device);
}

template <class T>
std::string start(const ManyProduct& p, const DecodeCut& cut, const Device& device) {
  if (!sm80::view_of(p.in).chunked || !sm80::view_of(p.weight).chunked) return start<T, 8, false>(p, cut, device);
  return p.out.rows <= 16 ? start<T, 2, true>(p, cut, device) : start<T, 8, true>(p, cut, device);
}

}  // namespace

Plan plan_many(const ManyProduct& p, const Device& device) {
  if (p.out.rows == 0 || p.out.columns == 0) return {};
  const DecodeCut cut = cut_of(p, device, true);
  return {cut.cycles, p.out.rows <= 16 ? 16 : 64, cut.parts,
          cut.parts > 1 ? cut.parts * p.out.rows * cut.part_stride(p.out.columns) * 4 : 0};
}

std::string product_many(const ManyProduct& p, const Device& device) {
  if (p.weight.type == Type::kFloat32) return "weight must be bf16 or fp16, got fp32; use the triton backend";
  if (std::max({p.out.rows, p.weight.rows, p.weight.columns}) > sm80::kLongestSide ||
      p.out.rows > kTokens * kMostGroups) {
    return "weight must have sides below 2^31 - 2^16, and x fewer rows than 2^22; split them";
  }
  if (p.out.rows == 0 || p.out.columns == 0) return "";
  const DecodeCut cut = cut_of(p, device, p.workspace != nullptr);
  return p.weight.type == Type::kBFloat16 ? start<BFloat16>(p, cut, device) : start<Float16>(p, cut, device);
}

}  // namespace mft::cuda
