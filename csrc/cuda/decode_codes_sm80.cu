// decode_codes_sm80: which products with quantised weights it takes, and how they are cut.
#include "decode_codes_sm80.cuh"

namespace mft::cuda {
namespace {

// Return the part of p that the decode kernel's launch reads: everything but the weight.
Product without_weight(const QuantizedProduct& p) {
  Product like;
  like.out = p.out, like.in = p.in, like.bias = p.bias, like.workspace = p.workspace;
  like.weight = {nullptr, p.in.type, p.weight.rows, p.weight.columns, p.weight.columns};
  return like;
}

template <class T, bool kNf4, bool kNested>
std::string start(const QuantizedProduct& p, const DecodeCut& cut, const Device& device) {
  using Source = sm80::CodesSource<T, kNf4, kNested>;
  const Product like = without_weight(p);
  auto a = sm80::decode_arguments<typename Source::Arguments>(like, cut, Source::kPieces);
  a.codes = sm80::codes_arguments(p);
  return sm80::launch_decode<T, Source>(like, a, cut, device);
}

template <class T>
std::string start(const QuantizedProduct& p, const DecodeCut& cut, const Device& device) {
  if (!p.weight.nf4) return start<T, false, false>(p, cut, device);
  return p.weight.absmax != nullptr ? start<T, true, false>(p, cut, device) : start<T, true, true>(p, cut, device);
}

}  // namespace

// Groups of the matrix are counted in 32 bits. A group of int8 has 16 weights.
bool takes_decode(const QuantizedProduct& p) {
  constexpr double kMostWeights = 16.0 * (int64_t{1} << 32);
  if (p.transposed || p.in.type == Type::kFloat32 || p.out.rows > kMostDecodeTokens) return false;
  if (p.out.rows == 0 || p.out.columns == 0 || p.in.columns == 0) return false;
  return sm80::is_whole(p) && static_cast<double>(p.weight.rows) * p.weight.columns < kMostWeights;
}

DecodeCut decode_cut(const QuantizedProduct& p, const Device& device, bool in_parts) {
  DecodeSize size;
  size.tokens = p.out.rows, size.tiles = decode_tiles(p.out.rows);
  size.pieces = decode_codes_pieces(p.weight.nf4);
  size.features = p.out.columns, size.units = quotient(p.in.columns, kDecodePiece * size.pieces);
  size.weight_bytes = weight_bytes(p), size.bytes = bytes_of(p);
  // A lane executes 6.1 to 6.6 instructions per weight with one or two tiles, and 8.4 to 8.8 with eight (SASS of
  // nvcc 13.0). A warp has 32 lanes, and four warps issue at once.
  size.weight_cycles = (6 + 0.3 * size.tiles) / (32 * 4);
  size.ahead = kDecodeCodesAhead, size.table_bytes = sm80::kCodesTableBytes;
  size.clusters = device.capability == 90;  // other devices may run compute_80's code: building/cuda.py
  const auto blocks = [&](int row_bits) { return decode_codes_blocks(p.weight.nf4, size.tiles, row_bits); };
  return decode_cut(size, blocks, device, in_parts);
}

Plan plan_decode(const QuantizedProduct& p, const Device& device) { return plan_of_cut(p, device); }

std::string decode_sm80(const QuantizedProduct& p, const Device& device) {
  const DecodeCut cut = decode_cut(p, device, p.workspace != nullptr);
  return p.in.type == Type::kBFloat16 ? start<BFloat16>(p, cut, device) : start<Float16>(p, cut, device);
}

}  // namespace mft::cuda
