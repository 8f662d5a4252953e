// out = in @ where(keep, weight, 0).T + bias for few tokens, as in decoding. The weight goes once from memory to
// registers, 16 bytes per load, and is an operand of mma.sync there. For any GPU from sm_80 on.
//
//                unit: 32 columns        The rows of A in mma.sync (16 x 16) are 16 features; tokens are columns, 8 per
//              +----+----+----+----+-    tile. Lane (g, q) holds columns 8 q to 8 q + 7 of a unit, for features g and
//  16 features | u0 | u1 | u2 | u3 |     g + 8. Two mma.sync take 4 of these columns each, in place of 2 q, 2 q + 1,
//              +----+----+----+----+-    2 q + 8 and 2 q + 9. `in` is read in the same order, so only the order of the
//                                        sums changes, and no byte is moved. A lane needs one byte of one word of the
//                                        mask per unit.
//
// A block has 8 warps: 8 / slices groups of 16 features. The `slices` warps of a group take its units in turn. A block
// may also have 16 warps, so that half as many blocks read `in`. The sums of slices are added in shared memory.
// `in` is there too, as much of it at a time as fits (a slab).
//
// Blocks cut the depth into parts. Either each part is a row of the grid: its sums go to the workspace, and sum_parts
// adds them in the order of the parts. Or, on sm_90, the parts are the blocks of a cluster: each block computes some of
// the results from the sums in the shared memory of all, in the same order. So the result does not depend on which
// block ends first. decode_cut.h chooses all these numbers.
//
// A warp has 4 units of the weight in flight, 4 KiB (by scores: 2 units, and 2 of the scores). The kernel takes up to
// 64 tokens. 17 to 64 tokens are two to four pairs of tiles; for them product_sm80.cu asks the model whether the
// general kernel is faster. Speed: not measured.
#pragma once

#include <type_traits>

#include "api.h"
#include "decode_cut.h"
#include "mask_sm80.h"

namespace mft::cuda::sm80 {

struct DecodeArguments {
  View out, in, weight;
  KeepArguments keep;
  const char* bias;  // or null
  float* parts;      // (parts, out.rows, part_stride); null: the depth is one part
  int64_t part_stride;
  int units, part_units, slab_units;  // of the depth: all, per part, per slab of `in`
  int slice_bits, feature_bits;       // log2 of 1, 2, 4 or 8 slices; log2 of the features of a block
  int cluster_bits;                   // log2 of the parts in a cluster: 1, 2, 4 or 8
  int step_bytes, step_columns;       // from one unit of a warp to its next
  int slab_steps;                     // a warp's units in a slab
  int in_stride;                      // bytes from one token to the next in shared memory
};

// Return the bytes of a row: an odd multiple of 64, so that the units of two tokens, which 8 lanes read, lie in
// different banks.
inline int decode_row_stride(int slab_units) { return (slab_units | 1) * 64; }

// Return the arguments of a product.
inline DecodeArguments decode_arguments(const Product& p, const DecodeCut& cut) {
  DecodeArguments a = {};
  a.out = view_of(p.out), a.in = view_of(p.in), a.weight = view_of(p.weight);
  a.keep = keep_arguments(p.keep, p.weight);
  a.bias = static_cast<const char*>(p.bias);
  a.part_stride = cut.part_stride(p.out.columns);
  if (cut.parts_in_memory() > 1) a.parts = static_cast<float*>(p.workspace);
  a.units = static_cast<int>(quotient(p.in.columns, kDecodeUnit));
  a.part_units = cut.part_units, a.slab_units = cut.slab_units, a.slice_bits = cut.slice_bits;
  a.feature_bits = cut.row_bits - cut.slice_bits, a.cluster_bits = cut.cluster_bits;
  a.step_columns = kDecodeUnit << cut.slice_bits, a.step_bytes = 2 * a.step_columns;
  a.slab_steps = static_cast<int>(quotient(cut.slab_units, int64_t{1} << cut.slice_bits));
  a.in_stride = decode_row_stride(cut.slab_units);
  return a;
}

// Return the address of an element in a matrix of 16-bit elements.
MFT_DEVICE char* at_16(const View& matrix, int row, int column) {
  return matrix.data + row * matrix.row_bytes + static_cast<int64_t>(column) * 2;
}

// Load 8 neighbours of a row, with zeros behind its end, which is `left` elements further on.
MFT_DEVICE isa::Words4 eight_of(const char* from, int left) {
  return left > 0 ? isa::load_streaming(from) : isa::Words4{};
}

// The block's tile of weight rows, and its part of the depth. Computed again where needed: registers are short in the
// loop.
struct DecodeBlock {
  int tile, part;

  MFT_DEVICE static DecodeBlock of(const DecodeArguments& a) {
    const int x = static_cast<int>(isa::block(0)), tile = x >> a.cluster_bits;
    return {tile, static_cast<int>(isa::block(1)) + x - (tile << a.cluster_bits)};
  }
};

// The same for a warp: its group of 16 features, and its slice.
struct DecodeWarp {
  int group, slice;

  MFT_DEVICE static DecodeWarp of(const DecodeArguments& a) {
    const int group = isa::warp() >> a.slice_bits;
    return {group, isa::warp() - (group << a.slice_bits)};
  }
};

// Where a warp reads: rows g and g + 8 of its 16 features, and every slices-th unit.
struct DecodePlace {
  int rows[2];
  int unit, count;  // the first unit, and how many units
  int column, end;  // the lane's first column, and the end of all

  // Rows behind the last one read that row again, and nobody writes their sums. A warp that has only such rows reads
  // none.
  MFT_DEVICE static DecodePlace of(const DecodeArguments& a) {
    const auto [group, slice] = DecodeWarp::of(a);
    const auto [tile, part] = DecodeBlock::of(a);
    const int feature = (tile << a.feature_bits) + 16 * group;
    const int first = part * a.part_units, left = a.units - first;
    const int units = left < a.part_units ? left : a.part_units, g = isa::lane() / 4, last = a.weight.rows - 1;
    DecodePlace place;
    for (int i = 0; i < 2; ++i) place.rows[i] = feature + g + 8 * i < last ? feature + g + 8 * i : last;
    place.unit = first + slice;
    place.count = feature <= last ? (units - slice + (1 << a.slice_bits) - 1) >> a.slice_bits : 0;
    place.column = kDecodeUnit * place.unit + 8 * (isa::lane() % 4);
    const int end = kDecodeUnit * (first + units);
    place.end = place.count == 0 ? 0 : end < a.weight.columns ? end : a.weight.columns;
    return place;
  }
};

// Reads the lane's 16 bytes of both rows, unit after unit.
class UnitReader {
 public:
  MFT_DEVICE UnitReader(const View& matrix, const DecodePlace& place) {
    for (int i = 0; i < 2; ++i) from_[i] = at_16(matrix, place.rows[i], place.column);
  }

  // left: columns left, counted from the lane's first in this unit.
  MFT_DEVICE void load(isa::Words4 (&to)[2], int left, const DecodeArguments& a) {
    for (int i = 0; i < 2; ++i) {
      to[i] = eight_of(from_[i], left);
      from_[i] += a.step_bytes;
    }
  }

 private:
  const char* from_[2];
};

// Selects the kept weights of a unit, by 16-bit scores, which are loaded like the weight.
template <class S, bool kMagnitude>
class DecodeMask {
  using Pair = KeepPair<S, kMagnitude>;

 public:
  static constexpr bool kWords = false;
  static constexpr int kAhead = decode_ahead(kWords);  // units of a warp in flight

  MFT_DEVICE DecodeMask(const DecodeArguments& a, const DecodePlace& place) : reader_(a.keep.scores, place) {
    for (int i = 0; i < 2; ++i) pairs_[i] = Pair::of(threshold_of<uint16_t>(a.keep, place.rows[i]) * 0x10001u);
  }

  MFT_DEVICE void load(int j, int left, const DecodeArguments& a) { reader_.load(scores_[j], left, a); }

  // Called before the kAhead units in front of `unit` are selected.
  MFT_DEVICE void ask(int, const DecodePlace&, const DecodeArguments&) {}

  MFT_DEVICE void select(uint32_t (&kept)[2][4], const isa::Words4 (&weights)[2], int j) const {
    for (int i = 0; i < 2; ++i) {
      for (int pair = 0; pair < 4; ++pair) {
        kept[i][pair] = pairs_[i].select(weights[i].words[pair], scores_[j][i].words[pair]);
      }
    }
  }

 private:
  UnitReader reader_;
  Pair pairs_[2];
  isa::Words4 scores_[kAhead][2];
};

// Selects by words. Lane q of four loads the words of the q-th of the next four units, and all four get them from it.
template <bool kMagnitude>
class DecodeMask<Words, kMagnitude> {
 public:
  static constexpr bool kWords = true;
  static constexpr int kAhead = decode_ahead(kWords);

  MFT_DEVICE DecodeMask(const DecodeArguments& a, const DecodePlace& place) {
    static_assert(kAhead == 4);
    for (int i = 0; i < 2; ++i) at_[i] = static_cast<int64_t>(place.rows[i]) * a.keep.row_words + place.unit;
  }

  MFT_DEVICE void load(int, int, const DecodeArguments&) {}

  // From here on, select() uses the words that were loaded before.
  MFT_DEVICE void ask(int unit, const DecodePlace& place, const DecodeArguments& a) {
    const int own = unit + isa::lane() % 4;
    for (int i = 0; i < 2; ++i) {
      now_[i] = next_[i];
      next_[i] = own < place.count ? a.keep.words[at_[i] + (own << a.slice_bits)] : ~0u;
    }
  }

  // One multiplication moves bits 2 pair and 2 pair + 1 of a byte to the tops of both halves.
  MFT_DEVICE void select(uint32_t (&kept)[2][4], const isa::Words4 (&weights)[2], int j) const {
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = isa::shuffle(now_[i], isa::lane() / 4 * 4 + j);
      const uint32_t byte = word >> (8 * (isa::lane() % 4)) & 0xff;
      for (int pair = 0; pair < 4; ++pair) {
        const uint32_t tops = byte * (1u << (15 - 2 * pair) | 1u << (30 - 2 * pair));
        kept[i][pair] = weights[i].words[pair] & isa::spread_signs(tops);
      }
    }
  }

 private:
  int64_t at_[2];
  uint32_t now_[2] = {}, next_[2] = {};
};

// T: of in, weight and out. kTiles: tiles of 8 tokens: 1, 2, or 8 for up to 8. kRowBits: log2 of the rows, 16 per warp.
template <class T, class Mask, int kTiles, int kRowBits>
struct DecodeKernel {
  static constexpr int kThreads = 2 << kRowBits;
  static constexpr int kBlocksPerMultiprocessor = decode_blocks(Mask::kWords, kTiles, kRowBits);
  static constexpr int kAhead = Mask::kAhead, kUnitBytes = 2 * kDecodeUnit;
  using Arguments = DecodeArguments;

  MFT_DEVICE static void run(const Arguments& a) {
    const DecodePlace place = DecodePlace::of(a);
    char* const shared = isa::shared_memory();
    UnitReader reader(a.weight, place);
    Mask mask(a, place);
    isa::Words4 weights[kAhead][2];       // the lane's share of a unit: 8 columns of rows g and g + 8
    int left = place.end - place.column;  // columns from the lane's first in the next unit on
    const auto load_next = [&](int j) {   // the j-th of kAhead
      reader.load(weights[j], left, a);
      mask.load(j, left, a);
      left -= a.step_columns;
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) load_next(j);
    mask.ask(0, place, a);

    float sums[kTiles][4] = {};
    for (int slab = 0, unit = 0; slab < a.part_units; slab += a.slab_units) {
      if (slab > 0) isa::sync_block();  // all warps are done with the slab before
      copy_in(a, shared, slab);
      isa::wait_copies<0>();
      isa::sync_block();
      const int end = unit + a.slab_steps < place.count ? unit + a.slab_steps : place.count;
      const char* x = shared + lane_row(a.out.rows) * a.in_stride + kUnitBytes * DecodeWarp::of(a).slice +
                      16 * (isa::lane() % 4);
      for (; unit < end; unit += kAhead) {
        mask.ask(unit + kAhead, place, a);
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (unit + j >= end) break;
          uint32_t kept[2][4];
          mask.select(kept, weights[j], j);
          load_next(j);
          multiply(sums, kept, x, a.in_stride, a.out.rows);
          x += a.step_bytes;
        }
      }
    }
    isa::sync_block();
    write(a, sums, shared);
  }

  static int shared_bytes(int tokens, int slab_units, int slice_bits) {
    const int rows = kTiles == 1 ? tokens : 8 * decode_tiles(tokens);  // the last ones may hold anything: see multiply()
    return std::max(rows * decode_row_stride(slab_units), 4 * tokens * sum_stride(kRowBits - slice_bits) << slice_bits);
  }

 private:
  MFT_DEVICE static int lane_row(int tokens) {
    const int g = isa::lane() / 4;
    return kTiles == 1 && g >= tokens ? tokens - 1 : g;
  }

  // Return 4 more than the number of features: then the 8 x 4 sums that a warp writes at once lie in different banks.
  static constexpr MFT_DEVICE int sum_stride(int feature_bits) { return (1 << feature_bits) + 4; }

  MFT_DEVICE static void copy_in(const Arguments& a, char* shared, int slab) {
    const int left = a.part_units - slab, units = left < a.slab_units ? left : a.slab_units;
    const int first = kDecodeUnit * (DecodeBlock::of(a).part * a.part_units + slab);
    constexpr bool kByWarp = kTiles > 1;  // each warp copies a token
    const int chunks = 4 * units;
    for (int token = kByWarp ? isa::warp() : 0; token < a.out.rows; token += kByWarp ? kThreads / 32 : 1) {
#pragma unroll 1
      for (int chunk = kByWarp ? isa::lane() : isa::thread(); chunk < chunks; chunk += kByWarp ? 32 : kThreads) {
        char* const to = shared + token * a.in_stride + kChunkBytes * chunk;
        isa::copy_async<kChunkBytes>(to, at_16(a.in, token, first + 8 * chunk), first + 8 * chunk < a.in.columns);
      }
    }
    isa::commit_copies();
  }

  // Each token is a column of its own, so the contents of rows behind the last token affect no other token. Pairs of
  // tiles without tokens are skipped. These branches also keep ptxas from loading all eight tiles at once, which made
  // it spill.
  MFT_DEVICE static void multiply(float (&sums)[kTiles][4], const uint32_t (&kept)[2][4], const char* x, int stride,
                                  int tokens) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile, x += 8 * stride) {
      if (tile > 0 && tile % 2 == 0 && 8 * tile >= tokens) break;
      const auto in = load<isa::Words4>(x);
      for (int half = 0; half < 4; half += 2) {
        const uint32_t weights[4] = {kept[0][half], kept[1][half], kept[0][half + 1], kept[1][half + 1]};
        isa::multiply_16x8x16<T>(sums[tile], weights, in.words[half], in.words[half + 1]);
      }
    }
  }

  // Add the sums slice by slice in shared memory, which `in` no longer needs. Then add them block by block of the
  // cluster, whose blocks share the results. Then write a part, or the results.
  MFT_DEVICE static void write(const Arguments& a, const float (&sums)[kTiles][4], char* shared) {
    const auto [group, slice] = DecodeWarp::of(a);
    const auto [tile, part] = DecodeBlock::of(a);
    const int features = 1 << a.feature_bits, first_feature = tile << a.feature_bits;
    float* const to = reinterpret_cast<float*>(shared);
    const int tokens = a.out.rows, stride = sum_stride(a.feature_bits), g = isa::lane() / 4, c = isa::lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int token = i / 4 * 8 + c + i % 2;
      if (token < tokens) to[(slice * tokens + token) * stride + 16 * group + i % 4 / 2 * 8 + g] = sums[i / 4][i % 4];
    }
    isa::sync_block();
    const int ranks = 1 << a.cluster_bits, slices = 1 << a.slice_bits;
    const auto place_of = [&](int at) { return to + (at >> a.feature_bits) * stride + (at & (features - 1)); };
    const auto sum_of_slices = [&](const float* from) {
      float sum = 0;
      for (int i = 0; i < slices; ++i) sum += from[i * tokens * stride];
      return sum;
    };
    if (ranks > 1) {  // its own slices first: a block then reads one number from each other block per result
      for (int at = isa::thread(); slices > 1 && at < tokens * features; at += kThreads) {
        *place_of(at) = sum_of_slices(place_of(at));
      }
      isa::sync_cluster();
    }
    for (int at = isa::rank_in_cluster() * kThreads + isa::thread(); at < tokens * features; at += ranks * kThreads) {
      const int token = at >> a.feature_bits, feature = first_feature + (at & (features - 1));
      float of_ranks[isa::kMostCluster] = {}, sum = 0;
      if (ranks == 1) {
        sum = sum_of_slices(place_of(at));
      } else {
#pragma unroll
        for (int rank = 0; rank < isa::kMostCluster; ++rank) {  // start all loads before waiting for one
          if (rank < ranks) of_ranks[rank] = isa::load_of_rank(place_of(at), rank);
        }
#pragma unroll
        for (int rank = 0; rank < isa::kMostCluster; ++rank) sum += of_ranks[rank];
      }
      if (a.parts != nullptr) {
        a.parts[(static_cast<int64_t>(part) * tokens + token) * a.part_stride + feature] = sum;
      } else if (feature < a.out.columns) {
        if (a.bias != nullptr) sum += isa::widen(load<T>(a.bias + 2 * static_cast<int64_t>(feature)));
        store(at_16(a.out, token, feature), isa::round_to<T>(sum).bits);
      }
    }
    isa::sync_warp();
    if (ranks > 1) isa::sync_cluster();  // no block ends while another may still read from it
  }
};

// Launch the kernel with this cut, and sum_parts after it if there are parts in memory. p: the output, bias and
// workspace.
template <class T, class Mask, int kTiles, int kRowBits>
std::string launch_decode(const Product& p, const DecodeCut& cut, const Device& device) {
  using Kernel = DecodeKernel<T, Mask, kTiles, kRowBits>;
  const DecodeArguments a = decode_arguments(p, cut);
  LaunchShape shape;
  shape.cluster = 1 << cut.cluster_bits;
  shape.x = cut.blocks(p.out.columns) * shape.cluster;
  shape.y = cut.parts_in_memory();
  shape.shared_bytes = Kernel::shared_bytes(a.out.rows, cut.slab_units, cut.slice_bits);
  const std::string error = isa::launch<Kernel>(shape, device.stream, a);
  return error.empty() && shape.y > 1 ? sum_parts(p, cut.parts, a.part_stride, device) : error;
}

template <class T, class Mask>
std::string launch_decode(const Product& p, const DecodeCut& cut, const Device& device) {
  constexpr int kUsual = kDecodeRowBits, kWide = kDecodeRowBits + 1;
  const bool wide = cut.row_bits > kUsual;
  if (p.out.rows <= 8) return launch_decode<T, Mask, 1, kUsual>(p, cut, device);
  if (p.out.rows <= 16) {
    return wide ? launch_decode<T, Mask, 2, kWide>(p, cut, device)
                : launch_decode<T, Mask, 2, kUsual>(p, cut, device);
  }
  return wide ? launch_decode<T, Mask, 8, kWide>(p, cut, device)
              : launch_decode<T, Mask, 8, kUsual>(p, cut, device);
}

}  // namespace mft::cuda::sm80
