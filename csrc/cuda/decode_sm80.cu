// decode_sm80: which products it takes, how they are cut, and which kernel is launched.
#include "decode_sm80.cuh"

namespace mft::cuda {
namespace {

template <class T>
std::string start(const Product& p, const DecodeCut& cut, const Device& device) {
  using sm80::DecodeMask;
  using sm80::launch_decode;
  if (p.keep.words != nullptr) return launch_decode<T, DecodeMask<sm80::Words, true>>(p, cut, device);
  return p.keep.magnitude ? launch_decode<T, DecodeMask<T, true>>(p, cut, device)
                          : launch_decode<T, DecodeMask<T, false>>(p, cut, device);
}

}  // namespace

bool takes_decode(const Product& p) {
  if (p.transposed || p.weight.type == Type::kFloat32 || p.out.rows > kMostDecodeTokens) return false;
  if (p.out.rows == 0 || p.out.columns == 0) return false;
  if (p.in.columns == 0 || !sm80::view_of(p.in).chunked || !sm80::view_of(p.weight).chunked) return false;
  return p.keep.words != nullptr || (p.keep.scores.type == p.weight.type && sm80::view_of(p.keep.scores).chunked);
}

DecodeCut decode_cut(const Product& p, const Device& device, bool in_parts) {
  const bool words = p.keep.words != nullptr;
  DecodeSize size;
  size.tokens = p.out.rows, size.tiles = decode_tiles(p.out.rows);
  size.features = p.out.columns, size.units = quotient(p.in.columns, kDecodeUnit);
  size.weight_bytes = 2 + (words ? 1.0 / 8 : 2);
  size.bytes = bytes_of(p);
  size.ahead = decode_ahead(words);
  size.clusters = device.capability == 90;  // other devices may run compute_80's code: building/cuda.py
  const auto blocks = [&](int row_bits) { return decode_blocks(words, size.tiles, row_bits); };
  return decode_cut(size, blocks, device, in_parts);
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
