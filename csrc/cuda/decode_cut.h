// How decode_sm80 cuts a product of few tokens: how many of a block's warps share a row of the weight, and how many
// blocks there are. If the weight has enough units, every multiprocessor gets a block. Among the cuts that achieve
// this, the model of tile_cost.h chooses. It counts repeated reads of `in`, and writes and reads of parts, as if they
// came from memory. In fact they come from L2, but its rate is known less well.
//
// On sm_90 the parts may be the blocks of a cluster, up to 8. Their sums go from one block's shared memory to
// another's, without a workspace or a second launch.
#pragma once

#include <algorithm>
#include <array>

#include "tile_cost.h"

namespace mft::cuda {

constexpr int kDecodeRowBits = 7;     // a block of 8 warps that share no rows has 128 rows; one of 16 warps has 256
constexpr int kDecodeUnit = 32;       // columns that two mma.sync multiply
constexpr int kMostClusterBits = 3;   // 8 blocks
constexpr int kMostDecodeTokens = 64;
constexpr int kMostDecodeParts = 32;  // a thread of sum_parts reads them one after another

// Return the number of tiles of 8 tokens: one, or an even number.
constexpr int decode_tiles(int64_t tokens) { return tokens <= 8 ? 1 : static_cast<int>((tokens + 15) / 16 * 2); }

// Return how many blocks share a multiprocessor. A thread has 80 registers; it needs more by scores with two tiles, and
// with eight tiles.
constexpr int decode_blocks(bool words, int tiles, int row_bits) {
  return row_bits > kDecodeRowBits ? 1 : tiles <= (words ? 2 : 1) ? 3 : 2;
}

// Return how many units of a warp are in flight: 4 KiB.
constexpr int decode_ahead(bool words) { return words ? 4 : 2; }

// The problem to cut.
struct DecodeSize {
  int64_t tokens;
  int tiles;                     // tiles of 8 tokens that are multiplied
  int64_t features, units;
  double weight_bytes;           // of one weight and its masks
  double bytes;                  // of all operands, once each
  int row_bits, blocks, ahead;   // of a block; blocks that share a multiprocessor; units of a warp in flight
  int most_slab;                 // units of `in` that fit in shared memory
  bool clusters = false;         // whether the parts may be the blocks of a cluster
};

struct DecodeCut {
  int row_bits = kDecodeRowBits, slice_bits = 0, parts = 1, part_units = 1, slab_units = 1;
  int cluster_bits = 0;  // log2: 2, 4 or 8 parts form a cluster; 0: one part, or they meet in the workspace
  bool all_work = false;
  double cycles = kNever, cost = kNever;  // expected time; what decides between cuts

  bool better_than(const DecodeCut& other) const { return all_work != other.all_work ? all_work : cost < other.cost; }

  int parts_in_memory() const { return parts >> cluster_bits; }  // 1: no parts in memory
  int features() const { return 1 << (row_bits - slice_bits); }  // per block
  int64_t blocks(int64_t all) const { return quotient(all, features()); }  // per part
  int64_t part_stride(int64_t all) const { return blocks(all) * features(); }
};

// tiles: blocks per part.
inline void count_cycles(DecodeCut& cut, const DecodeSize& size, int64_t tiles, const Device& device) {
  const int rows = 1 << cut.row_bits, slices = 1 << cut.slice_bits, in_memory = cut.parts_in_memory();
  // The multiprocessors that clusters of this size can fill.
  const int multiprocessors = std::max(1, device.multiprocessors >> cut.cluster_bits) << cut.cluster_bits;
  Jobs jobs;
  jobs.count = tiles * cut.parts;
  jobs.steps = quotient(cut.part_units, slices);
  jobs.read = kDecodeUnit * (rows * size.weight_bytes + 2.0 * size.tokens * slices);
  jobs.written = static_cast<double>(cut.features()) * size.tokens * (cut.parts > 1 ? 4 : 2);
  const int clusters = cut.cluster_bits > 0 ? kMostClusterBits : 0;  // clusters of 8 leave 4 of 132 without work
  cut.all_work = jobs.count >= device.multiprocessors >> clusters << clusters;
  const int64_t waves = quotient(jobs.count, static_cast<int64_t>(multiprocessors) * size.blocks);
  const int64_t waits = quotient(cut.part_units, cut.slab_units) - 1 + (cut.cluster_bits > 0);  // slabs; the cluster
  const Rates rates = rates_of(device.capability);
  jobs.multiply_adds = 8.0 * size.tiles * rows * kDecodeUnit;
  const double busy =
      busy_cycles(jobs, multiprocessors, size.blocks, size.ahead + 1, rates.multiply_adds, rates.l2) +
      waves * waits * kLatency;
  const double results = static_cast<double>(size.tokens) * size.features;
  const double of_parts = in_memory > 1 ? 8 * in_memory * results : 0;
  const double again = 2.0 * kDecodeUnit * size.units * size.tokens * tiles + of_parts;
  const double sum = sum_cycles(in_memory, results, device);
  cut.cycles = launch_cycles(busy, size.bytes, device) + sum;
  cut.cost = launch_cycles(busy, size.bytes + again, device) + sum;
}

// Return how many units of `in` fit in a block's shared memory if it keeps `rows` rows there; at least a warp's round.
inline int decode_slab(int64_t rows, const DecodeSize& size, const Device& device) {
  constexpr int kReserved = 1024;  // for the system
  const int64_t unit = 2 * kDecodeUnit * rows;
  const int64_t room = device.shared_bytes / size.blocks - kReserved - unit;  // see row_stride
  return static_cast<int>(std::max<int64_t>(size.ahead, room / unit));
}

// in_parts: whether there is a workspace for more than one part.
inline DecodeCut find_decode_cut(const DecodeSize& size, const Device& device, bool in_parts) {
  DecodeCut best;
  const int64_t units = std::max<int64_t>(size.units, 1);
  for (int slice_bits = 0; slice_bits <= 3; ++slice_bits) {
    const int slices = 1 << slice_bits;
    const int round = slices * size.ahead;  // a slab that is not the last of its part has whole rounds
    if (slices > units) break;
    const int64_t tiles = quotient(size.features, (1 << size.row_bits) / slices);
    const int64_t most = in_parts ? std::min<int64_t>(quotient(units, slices), kMostDecodeParts) : 1;
    const auto consider = [&](int64_t part_units, int cluster_bits) {
      if (part_units > size.most_slab && round > size.most_slab && slices > 1) return;
      DecodeCut cut;
      cut.row_bits = size.row_bits, cut.slice_bits = slice_bits, cut.cluster_bits = cluster_bits;
      cut.parts = static_cast<int>(quotient(units, part_units));
      cut.part_units = static_cast<int>(part_units);
      const int whole_rounds = std::max(1, size.most_slab / round) * round;
      cut.slab_units = part_units <= size.most_slab ? cut.part_units : whole_rounds;
      count_cycles(cut, size, tiles, device);
      if (cut.better_than(best)) best = cut;
    };
    for (const int each : {1, 2}) {  // blocks that each multiprocessor should get
      const int64_t wanted = static_cast<int64_t>(each) * device.multiprocessors;
      const int64_t least = std::min(quotient(wanted, tiles), most);
      int64_t part_units = quotient(units, least);
      if (tiles * quotient(units, part_units) < wanted && quotient(units, units / least) <= most) {
        part_units = units / least;  // rounding up gave too few blocks
      }
      consider(part_units, 0);
    }
    for (int bits = 1; size.clusters && bits <= kMostClusterBits; ++bits) {
      const int64_t blocks = int64_t{1} << bits, part_units = quotient(units, blocks);
      if (blocks <= quotient(units, slices) && quotient(units, part_units) == blocks) consider(part_units, bits);
    }
  }
  return best;
}

// The cuts found so far, by everything that they depend on. A product of one token asks at least twice: for the
// workspace and for the launch.
class DecodeCuts {
 public:
  int64_t searches = 0;

  const DecodeCut& find(const DecodeSize& size, const Device& device, bool in_parts) {
    const Key key = key_of(size, device, in_parts);
    const auto place = static_cast<uint64_t>(size.tokens + 67 * size.features + 257 * size.units + 2 * in_parts);
    Entry& entry = entries_[(place + static_cast<uint64_t>(size.row_bits)) % entries_.size()];
    if (entry.key != key) {
      entry = {key, find_decode_cut(size, device, in_parts)};
      ++searches;
    }
    return entry.cut;
  }

 private:
  using Key = std::array<double, 16>;  // a double holds every number here exactly
  struct Entry {
    Key key{};  // matches no cut: none is for 0 multiprocessors
    DecodeCut cut;
  };

  static Key key_of(const DecodeSize& s, const Device& d, bool in_parts) {
    const auto exact = [](int64_t number) { return static_cast<double>(number); };
    return {exact(s.tokens), exact(s.tiles), exact(s.features), exact(s.units),
            s.weight_bytes, s.bytes, exact(s.row_bits), exact(s.blocks), exact(s.ahead),
            exact(s.most_slab), exact(s.clusters), exact(d.multiprocessors), exact(d.capability),
            exact(d.shared_bytes), exact(d.l2_bytes), exact(in_parts)};
  }

  std::array<Entry, 127> entries_;  // a model's matrices times a few numbers of tokens: 30 KiB per thread; prime
};

inline const DecodeCut& decode_cut(const DecodeSize& size, const Device& device, bool in_parts) {
  static thread_local DecodeCuts cuts;
  return cuts.find(size, device, in_parts);
}

// Return the better cut of blocks of 8 warps and, with more than one tile, of 16 warps. blocks(row_bits): how many
// blocks share a multiprocessor.
template <class Blocks>
DecodeCut decode_cut(DecodeSize size, const Blocks& blocks, const Device& device, bool in_parts) {
  DecodeCut best;
  for (int wide = 0; wide <= (size.tiles > 1); ++wide) {
    size.row_bits = kDecodeRowBits + wide;
    size.blocks = blocks(size.row_bits);
    size.most_slab = decode_slab(size.tiles == 1 ? size.tokens : 8 * size.tiles, size, device);
    const DecodeCut& cut = decode_cut(size, device, in_parts);
    if (cut.better_than(best)) best = cut;
  }
  return best;
}

// For the products that takes_decode() accepts.
DecodeCut decode_cut(const Product& p, const Device& device, bool in_parts);

}  // namespace mft::cuda
