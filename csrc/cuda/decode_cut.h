// How decode_sm80 cuts a product of few tokens: how many of a block's warps share a row of the weight, and how many
// blocks. Every multiprocessor gets a block where the weight has units enough; among the ways to that the model of
// tile_cost.h chooses, with what blocks read again of `in` and what parts write and read counted as if it came from
// memory: it comes from L2, whose rate is known less well.
#pragma once

#include <algorithm>

#include "tile_cost.h"

namespace mft::cuda {

constexpr int kDecodeRowBits = 7;
constexpr int kDecodeRows = 1 << kDecodeRowBits;  // of the weight, in a block whose warps share none
constexpr int kDecodeUnit = 32;       // columns: a word of the mask
constexpr int kMostDecodeParts = 32;  // a thread of sum_parts reads them one after another

// Of tokens, 8 each: one, or pairs.
constexpr int decode_tiles(int64_t tokens) { return tokens <= 8 ? 1 : static_cast<int>((tokens + 15) / 16 * 2); }

// Blocks that share a multiprocessor: 80 registers a thread, and more by scores with two tiles, or with eight.
constexpr int decode_blocks(bool words, int tiles) { return tiles <= (words ? 2 : 1) ? 3 : 2; }

// Units of a warp on their way: 4 KiB.
constexpr int decode_ahead(bool words) { return words ? 4 : 2; }

// What is cut.
struct DecodeSize {
  int64_t tokens, groups;        // of a block; of blocks along the tokens
  int tiles;                     // of 8 tokens, which are multiplied
  int64_t features, units;
  double weight_bytes;           // of a weight and its masks
  double bytes;                  // of all operands, once each
  int blocks, ahead;             // that share a multiprocessor; units of a warp on their way
  int most_slab;                 // units of `in` that fit shared memory
};

struct DecodeCut {
  int slice_bits = 0, parts = 1, part_units = 1, slab_units = 1;
  bool all_work = false;
  double cycles = kNever, cost = kNever;  // expected; and by which it is chosen

  bool better_than(const DecodeCut& other) const { return all_work != other.all_work ? all_work : cost < other.cost; }

  int64_t blocks(int64_t features) const { return quotient(features, kDecodeRows >> slice_bits); }  // of a part
  int64_t part_stride(int64_t features) const { return blocks(features) * (kDecodeRows >> slice_bits); }
};

// tiles: blocks of a part.
inline void count_cycles(DecodeCut& cut, const DecodeSize& size, int64_t tiles, const Device& device) {
  const int rows = kDecodeRows >> cut.slice_bits, slices = 1 << cut.slice_bits;
  Jobs jobs;
  jobs.count = tiles * cut.parts;
  jobs.steps = quotient(cut.part_units, slices);
  jobs.multiply_adds = static_cast<double>(kDecodeRows) * kDecodeUnit * size.tiles * 8;
  jobs.read = kDecodeUnit * (kDecodeRows * size.weight_bytes + 2.0 * size.tokens * slices);
  jobs.written = static_cast<double>(rows) * size.tokens * (cut.parts > 1 ? 4 : 2);
  const int64_t waves = quotient(jobs.count, static_cast<int64_t>(device.multiprocessors) * size.blocks);
  const int64_t slabs = quotient(cut.part_units, cut.slab_units);  // each is waited for
  const double busy = busy_cycles(jobs, device.multiprocessors, size.blocks, size.ahead + 1,
                                  rates_of(device.capability).multiply_adds) +
                      waves * (slabs - 1) * kLatency;
  const double results = static_cast<double>(size.tokens) * size.groups * size.features;
  const double of_parts = cut.parts > 1 ? 8 * cut.parts * results : 0;
  const double again = 2.0 * kDecodeUnit * size.units * size.tokens * tiles + of_parts;
  const double sum = sum_cycles(cut.parts, results, device);
  cut.cycles = launch_cycles(busy, size.bytes, device) + sum;
  cut.cost = launch_cycles(busy, size.bytes + again, device) + sum;
}

// How many units of `in` a block has room for in shared memory, where so many share it; 4: of a warp's round at least.
inline int decode_slab(int64_t tokens, int blocks, const Device& device) {
  const int64_t room = device.shared_bytes / blocks - 1024 - 64 * tokens;  // 1 KiB: the system's; 64: see row_stride
  return static_cast<int>(std::max<int64_t>(4, room / (64 * tokens)));
}

// in_parts: whether there is a workspace for more than one.
inline DecodeCut decode_cut(const DecodeSize& size, const Device& device, bool in_parts) {
  DecodeCut best;
  const int64_t units = std::max<int64_t>(size.units, 1);
  for (int slice_bits = 0; slice_bits <= 3; ++slice_bits) {
    const int slices = 1 << slice_bits;
    const int round = slices * size.ahead;  // a slab that is not the last of its part has whole rounds
    if (slices > units) break;
    const int64_t tiles = quotient(size.features, kDecodeRows / slices) * size.groups;
    const int64_t most = in_parts ? std::min<int64_t>(quotient(units, slices), kMostDecodeParts) : 1;
    for (const int each : {1, 2}) {  // blocks that a multiprocessor shall have
      const int64_t wanted = static_cast<int64_t>(each) * device.multiprocessors;
      const int64_t least = std::min(quotient(wanted, tiles), most);
      int64_t part_units = quotient(units, least);
      if (tiles * quotient(units, part_units) < wanted && quotient(units, units / least) <= most) {
        part_units = units / least;  // rounded up, there were too few
      }
      if (part_units > size.most_slab && round > size.most_slab && slices > 1) continue;
      DecodeCut cut;
      cut.slice_bits = slice_bits;
      cut.parts = static_cast<int>(quotient(units, part_units));
      cut.part_units = static_cast<int>(part_units);
      const int whole_rounds = std::max(1, size.most_slab / round) * round;
      cut.slab_units = part_units <= size.most_slab ? cut.part_units : whole_rounds;
      cut.all_work = tiles * cut.parts >= device.multiprocessors;
      count_cycles(cut, size, tiles, device);
      if (cut.better_than(best)) best = cut;
    }
  }
  return best;
}

DecodeCut decode_cut(const Product& p, const Device& device, bool in_parts);  // of what takes_decode

}  // namespace mft::cuda
