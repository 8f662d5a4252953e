// decode_sm80: which products it takes, how they are cut, and which kernel that is.
#include "decode_sm80.cuh"

namespace mft::cuda {
namespace {

constexpr int64_t kMostTokens = 64;

template <class T, class S, bool kMagnitude, int kTiles, int kRowBits>
std::string start(const Product& p, const DecodeCut& cut, const Device& device) {
  using Kernel = sm80::DecodeKernel<T, sm80::WeightSource<S, kMagnitude>, kTiles, kRowBits>;
  auto a = sm80::decode_arguments<sm80::DecodeArguments>(p, cut);
  a.keep = sm80::keep_arguments(p.keep, p.weight);
  LaunchShape shape;
  shape.cluster = 1 << cut.cluster_bits;
  shape.x = cut.blocks(p.out.columns) * shape.cluster;
  shape.y = cut.parts_in_memory();
  shape.shared_bytes = Kernel::shared_bytes(a.out.rows, cut.slab_units, cut.slice_bits);
  const std::string error = isa::launch<Kernel>(shape, device.stream, a);
  return error.empty() && shape.y > 1 ? sum_parts(p, cut.parts, a.part_stride, device) : error;
}

template <class T, class S, bool kMagnitude>
std::string start(const Product& p, const DecodeCut& cut, const Device& device) {
  if (p.out.rows <= 8) return start<T, S, kMagnitude, 1, kDecodeRowBits>(p, cut, device);
  const bool wide = cut.row_bits > kDecodeRowBits;
  if (p.out.rows <= 16) {
    return wide ? start<T, S, kMagnitude, 2, kDecodeRowBits + 1>(p, cut, device)
                : start<T, S, kMagnitude, 2, kDecodeRowBits>(p, cut, device);
  }
  return wide ? start<T, S, kMagnitude, 8, kDecodeRowBits + 1>(p, cut, device)
              : start<T, S, kMagnitude, 8, kDecodeRowBits>(p, cut, device);
}

template <class T>
std::string start(const Product& p, const DecodeCut& cut, const Device& device) {
  if (p.keep.words != nullptr) return start<T, sm80::Words, true>(p, cut, device);
  return p.keep.magnitude ? start<T, T, true>(p, cut, device) : start<T, T, false>(p, cut, device);
}

}  // namespace

bool takes_decode(const Product& p) {
  if (p.transposed || p.weight.type == Type::kFloat32 || p.out.rows > kMostTokens) return false;
  if (p.out.rows == 0 || p.out.columns == 0) return false;
  if (p.in.columns == 0 || !sm80::view_of(p.in).chunked || !sm80::view_of(p.weight).chunked) return false;
  return p.keep.words != nullptr || (p.keep.scores.type == p.weight.type && sm80::view_of(p.keep.scores).chunked);
}

DecodeCut decode_cut(const Product& p, const Device& device, bool in_parts) {
  const bool words = p.keep.words != nullptr;
  DecodeSize size;
  size.tokens = p.out.rows, size.groups = 1, size.tiles = decode_tiles(p.out.rows);
  size.features = p.out.columns, size.units = quotient(p.in.columns, kDecodePiece);
  size.weight_bytes = 2 + (words ? 1.0 / 8 : 2);
  size.bytes = bytes_of(p);
  size.ahead = decode_ahead(words);
  size.clusters = device.capability == 90;  // elsewhere compute_80's code may run: building/cuda.py
  DecodeCut best;
  for (int wide = 0; wide <= (size.tiles > 1); ++wide) {
    size.row_bits = kDecodeRowBits + wide;
    size.blocks = decode_blocks(words, size.tiles, size.row_bits);
    size.most_slab = decode_slab(size.tiles == 1 ? size.tokens : 8 * size.tiles, size, device);
    const DecodeCut cut = decode_cut(size, device, in_parts);
    if (cut.better_than(best)) best = cut;
  }
  return best;
}

Plan plan_decode(const Product& p, const Device& device) {
  const DecodeCut cut = decode_cut(p, device, true);
  const int parts = cut.parts_in_memory();
  const int64_t bytes = parts > 1 ? parts * p.out.rows * cut.part_stride(p.out.columns) * 4 : 0;
  return {cut.cycles, 8 * decode_tiles(p.out.rows), parts, bytes};
}

std::string decode_sm80(const Product& p, const Device& device) {
  const DecodeCut cut = decode_cut(p, device, p.workspace != nullptr);
  return p.weight.type == Type::kBFloat16 ? start<BFloat16>(p, cut, device) : start<Float16>(p, cut, device);
}

}  // namespace mft::cuda
