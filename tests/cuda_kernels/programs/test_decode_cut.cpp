// decode_cut remembers the result that it would find again, whatever else was asked for, and searches for it once.
#include <cstdio>
#include <random>

#include "decode_cut.h"

using namespace mft::cuda;

namespace {

DecodeSize size_of(int64_t tokens, int64_t features, int64_t units, bool words) {
  DecodeSize size;
  size.tokens = tokens, size.tiles = decode_tiles(tokens);
  size.features = features, size.units = units;
  size.weight_bytes = 2 + (words ? 1.0 / 8 : 2);
  size.bytes = features * units * kDecodeUnit * size.weight_bytes;
  size.row_bits = kDecodeRowBits, size.ahead = decode_ahead(words);
  size.blocks = decode_blocks(words, size.tiles, size.row_bits);
  size.clusters = !words;
  return size;
}

bool same(const DecodeCut& a, const DecodeCut& b) {
  return a.row_bits == b.row_bits && a.slice_bits == b.slice_bits && a.parts == b.parts && a.part_units == b.part_units &&
         a.slab_units == b.slab_units && a.cluster_bits == b.cluster_bits && a.cycles == b.cycles && a.cost == b.cost;
}

}  // namespace

int main() {
  DecodeCuts cuts;
  Device device;
  std::mt19937 random(0);
  int mistakes = 0;
  for (int i = 0; i < 20000; ++i) {  // some hundred sizes on three cards: entries replace others
    device.multiprocessors = 1 << random() % 3;
    DecodeSize size = size_of(1 + random() % 4, 128 * (1 + random() % 4), 1 + random() % 3, random() % 2);
    size.most_slab = decode_slab(8, size, device);
    const bool in_parts = random() % 2;
    mistakes += !same(cuts.find(size, device, in_parts), find_decode_cut(size, device, in_parts));
  }
  DecodeCuts of_model;
  device.multiprocessors = 132;
  const int64_t matrices[][2] = {{4096, 128}, {1024, 128}, {11008, 128}, {4096, 344}};  // features, units
  for (int token = 0; token < 10; ++token) {
    for (const auto& [features, units] : matrices) {
      DecodeSize size = size_of(1, features, units, true);
      size.most_slab = decode_slab(8, size, device);
      for (const bool in_parts : {true, false}) of_model.find(size, device, in_parts);
    }
  }
  std::printf("%d mistakes, %d searches\n", mistakes, static_cast<int>(of_model.searches));
  return mistakes != 0 || of_model.searches != 8;
}
