// out = in @ where(keep, w, 0).T + bias, and with the weight transposed (d_x). w is decoded from codes and masked at
// the same place. For any GPU from sm_80 on. code_levels.h defines the codes.
//
//            64 depths                  In a step of a block, 128 features of 64 depths are 256 groups of 32 weights,
//          +---+---+                    one per thread. A group is 16 bytes of codes (32 in int8), one absmax and one
// features | 0 | 1 | codes, 0.5625      word of the mask. Groups stream through shared memory in 2 to 4 stages
//          | 2 | 3 | bytes per weight   (cp.async), where only their thread reads them. It decodes and masks its group
//          +---+---+                    once, into one of two tiles of T. All warps multiply the step before from the
//          +---+---+                    other tile, as in product_sm80.cuh.
//   tokens |  in   |
//          +---+---+                    Transposed, a step is 64 rows of the weight and 128 columns.
//
// Rows that are not whole groups, and codes that are not aligned, are read byte by byte: correct, but slow. Parts of
// the depth are as in product_sm80. Speed: not measured.
#pragma once

#include "codes_sm80.h"
#include "product_tile_sm80.h"

namespace mft::cuda::sm80 {

constexpr int kQuantizedDepth = 64;  // of a step; each thread decodes one group of it

struct QuantizedArguments : ProductTileArguments {
  CodesArguments weight;
  int rows, columns;  // of the weight
};

// Reads the groups of one step after the other, downwards or to the right. kWhole: each group is 32 weights with
// aligned codes.
template <class T, bool kNf4, bool kTransposed, bool kWhole>
class QuantizedReader {
  static constexpr int kGroups = (kTransposed ? kTileFeatures : kQuantizedDepth) / kGroup;  // in a row of the tile
  static constexpr int kChunks = kNf4 ? 1 : 2;                                              // of codes, in a group

 public:
  using Weight = Tile<kTransposed ? kQuantizedDepth : kTileFeatures, kTransposed ? kTileFeatures : kQuantizedDepth, 2>;
  static_assert(Weight::kRows * kGroups == kThreads);
  static constexpr int kScaleBytes = 4 * kThreads, kWordBytes = 4 * kThreads;
  static constexpr int kStageBytes = kWhole ? kChunks * kChunkBytes * kThreads + kScaleBytes + kWordBytes : 0;

  // first: the block's first feature. depth: the first of `length`.
  MFT_DEVICE QuantizedReader(const QuantizedArguments& a, int first, int depth, int length)
      : a_(a), row_(row() + (kTransposed ? depth : first)), column_(kGroup * group() + (kTransposed ? first : depth)) {
    place_ = static_cast<uint64_t>(row_) * a.columns + column_;
    left_ = kTransposed ? (column_ < a.columns ? length - row() : 0) : (row_ < a.rows ? length - kGroup * group() : 0);
    prefetch();
  }

  MFT_DEVICE void copy(char* stage) {
    if constexpr (kWhole) {
      const bool there = left_ > 0;
      for (int i = 0; i < kChunks; ++i) {
        const char* const from = a_.weight.codes + (kNf4 ? place_ / 2 : place_ + kChunkBytes * i);
        isa::copy_async<kChunkBytes>(codes_of(stage, i), from, there);
      }
      if (!kNf4 || a_.weight.absmax != nullptr) {
        isa::copy_async<4>(scale_of(stage), a_.weight.absmax + (kNf4 ? place_ / kNf4Block : row_), there);
      } else {
        store(scale_of(stage), there ? nested_of(absmax_code_, place_ / kNf4Block) : 0.0f);
      }
      if (a_.weight.words != nullptr) {
        isa::copy_async<4>(word_of(stage), a_.weight.words + place_ / 32, there);
      } else {
        store(word_of(stage), there ? ~0u : 0u);
      }
      advance();
      prefetch();
    }
  }

  // Decode the thread's group of the next step into a tile of T: from the stage that copy() has filled, else from
  // memory.
  MFT_DEVICE void decode(char* tile, const char* stage) {
    if constexpr (kWhole) {
      isa::Words4 codes[kChunks];
      for (int i = 0; i < kChunks; ++i) codes[i] = load<isa::Words4>(codes_of(stage, i));
      const float scale = scale_from(load<float>(scale_of(stage)));
      write(tile, codes, scale, scale, kGroup, load<uint32_t>(word_of(stage)));
    } else {
      const int rest = a_.columns - column_, count = left_ <= 0 ? 0 : rest < kGroup ? rest : kGroup;
      isa::Words4 codes[kChunks] = {};
      for (int i = 0; i < kGroup; ++i) {
        if (i < count) put_code(codes, i, place_ + i);
      }
      const int first = kNf4Block - static_cast<int>(place_ % kNf4Block);  // weights left in the block where it begins
      float scale = 0, next = 0;
      uint32_t word = 0;
      if (count > 0) {
        scale = kNf4 ? absmax_of(place_ / kNf4Block) : scale_from(a_.weight.absmax[row_]);
        next = kNf4 && first < count ? absmax_of(place_ / kNf4Block + 1) : scale;
        word = count < kGroup ? (1u << count) - 1 : ~0u;
        const uint32_t* const words = a_.weight.words;
        if (words != nullptr) word &= words[static_cast<int64_t>(row_) * tiles_of(a_.columns, 32) + column_ / 32];
      }
      write(tile, codes, scale, next, first, word);
      advance();
    }
  }

 private:
  MFT_DEVICE static int row() { return isa::thread() / kGroups; }
  MFT_DEVICE static int group() { return isa::thread() % kGroups; }

  MFT_DEVICE static char* codes_of(char* stage, int i) { return stage + (i * kThreads + isa::thread()) * kChunkBytes; }
  MFT_DEVICE static char* scale_of(char* stage) {
    return stage + kChunks * kChunkBytes * kThreads + 4 * isa::thread();
  }
  MFT_DEVICE static char* word_of(char* stage) { return scale_of(stage) + kScaleBytes; }
  MFT_DEVICE static const char* codes_of(const char* stage, int i) { return codes_of(const_cast<char*>(stage), i); }
  MFT_DEVICE static const char* scale_of(const char* stage) { return scale_of(const_cast<char*>(stage)); }
  MFT_DEVICE static const char* word_of(const char* stage) { return word_of(const_cast<char*>(stage)); }

  MFT_DEVICE void advance() {
    (kTransposed ? row_ : column_) += kQuantizedDepth;
    place_ += kTransposed ? static_cast<uint64_t>(a_.columns) * kQuantizedDepth : kQuantizedDepth;
    left_ -= kQuantizedDepth;
  }

  // Load the code of an absmax from memory one step before its use.
  MFT_DEVICE void prefetch() {
    if constexpr (kNf4 && kWhole) {
      if (a_.weight.absmax == nullptr && left_ > 0) absmax_code_ = a_.weight.absmax_codes[place_ / kNf4Block];
    }
  }

  MFT_DEVICE float nested_of(uint32_t code, uint64_t block) const {
    const CodesArguments& w = a_.weight;
    return nested_absmax(w.map[code], w.nested[block / kNestedBlock], w.offset[0]);
  }

  MFT_DEVICE float absmax_of(uint64_t block) const {
    return a_.weight.absmax != nullptr ? a_.weight.absmax[block] : nested_of(a_.weight.absmax_codes[block], block);
  }

  MFT_DEVICE static float scale_from(float absmax) { return kNf4 ? absmax : over_127(absmax); }

  // Put a code into the place that it would have in a chunk.
  MFT_DEVICE void put_code(isa::Words4 (&codes)[kChunks], int i, uint64_t place) const {
    const auto byte = static_cast<uint8_t>(a_.weight.codes[kNf4 ? place / 2 : place]);
    if constexpr (kNf4) {
      const uint32_t code = place % 2 == 0 ? byte >> 4 : byte & 15;
      codes[0].words[i / 8] |= code << (8 * (i / 2 % 4) + (i % 2 == 0 ? 4 : 0));
    } else {
      codes[i / 16].words[i / 4 % 4] |= static_cast<uint32_t>(byte) << (8 * (i % 4));
    }
  }

  // The first `first` weights of the group have one scale, the others the next.
  MFT_DEVICE static void write(char* tile, const isa::Words4 (&codes)[kChunks], float scale, float next, int first,
                               uint32_t word) {
    const int at = Weight::offset(row(), 4 * group()) - row() * Weight::kRowBytes;
#pragma unroll
    for (int chunk = 0; chunk < kGroup / 8; ++chunk) {
      float numbers[8];
      if constexpr (kNf4) {
        levels_of(numbers, table(), codes[0].words[chunk]);
      } else {
        numbers_of(numbers, codes[chunk / 2].words[chunk % 2 * 2], codes[chunk / 2].words[chunk % 2 * 2 + 1]);
      }
      const auto scale_at = [&](int i) { return kWhole || 8 * chunk + i < first ? scale : next; };
      isa::Words4 weights;
      select_eight<T>(weights.words, numbers, scale_at, word, chunk);
      store(tile + row() * Weight::kRowBytes + (at ^ chunk * kChunkBytes), weights);
    }
  }

 public:
  // Return the table of the levels, which lies behind the two tiles.
  MFT_DEVICE static char* table() { return isa::shared_memory() + 2 * Weight::kBytes; }

 private:
  const QuantizedArguments& a_;
  int row_, column_;  // where the thread's next group begins
  uint64_t place_;    // its place in the whole matrix; kept, because multiplying in each step would need more registers
  int left_;          // how much of the depth is left from there on, if any
  uint32_t absmax_code_ = 0;
};

// T: of in and out. kWhole: in is chunked, and the groups are whole. kTokens: 128, 64 or 16 per tile.
template <class T, bool kNf4, bool kTransposed, bool kWhole, int kTokens>
struct QuantizedKernel {
  static constexpr int kThreads = sm80::kThreads;
  // One block: loads by elements need registers, and 128 tokens with int8 need more than half of sm_80's shared memory.
  static constexpr int kBlocksPerMultiprocessor = kWhole && (kNf4 || kTokens < 128) ? 2 : 1;
  using Arguments = QuantizedArguments;

  using In = Tile<kTokens, kQuantizedDepth, 2>;
  using Reader = QuantizedReader<T, kNf4, kTransposed, kWhole>;
  using Weight = typename Reader::Weight;
  using Result = ProductTile<T, kTokens, kTokens == 16 ? 1 : 2>;
  static constexpr int kStageBytes = In::kBytes + Reader::kStageBytes;
  static constexpr int kBeside = 2 * Weight::kBytes + 128;  // decoded tiles, and the table
  static_assert(kStageBytes % 128 == 0 && Result::Out::kBytes <= 2 * Weight::kBytes);

  MFT_DEVICE static void run(const Arguments& a) {
    const ProductPlace place = Result::place_of(a);
    const int depth = static_cast<int>(isa::block(1)) * a.part_depth, rest = a.in.columns - depth;
    const int length = a.part_depth < rest ? a.part_depth : rest;
    char *const tiles = isa::shared_memory(), *const stages = tiles + kBeside;
    if (isa::thread() < 16) store(Reader::table() + 4 * isa::thread(), a.weight.levels[isa::thread()]);

    TileReader<In, false, kWhole, kThreads> in(a.in, place.token, depth, length);
    Reader weight(a, place.feature, depth, length);
    const auto copy = [&](int stage) {
      in.copy(stages + stage * kStageBytes);
      weight.copy(stages + stage * kStageBytes + In::kBytes);
      isa::commit_copies();
    };
    const auto decode = [&](int stage, int tile) {
      weight.decode(tiles + tile * Weight::kBytes, stages + stage * kStageBytes + In::kBytes);
    };

    typename Result::Sums sums = {};
    const auto sum = [&](auto number) {
      constexpr int kStages = decltype(number)::value;
      for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);
      isa::wait_copies<kStages - 2>();
      isa::sync_block();  // for the table
      decode(0, 0);
      int stage = 0, tile = 0;
      for (int left = length; left > 0; left -= kQuantizedDepth) {
        isa::sync_block();  // all warps have tile and `in`, and are done with those before, which are overwritten
        copy(stage == 0 ? kStages - 1 : stage - 1);  // behind the end: zeros, which nobody reads
        const ProductPlace now = Result::place_of(a);  // here and below, because registers are short in the loop
        Result::template multiply<In, Weight, kTransposed>(sums, stages + stage * kStageBytes,
                                                           tiles + tile * Weight::kBytes, now.warp_token,
                                                           now.warp_feature, [](auto&, int, int) {});
        stage = stage == kStages - 1 ? 0 : stage + 1;
        tile = 1 - tile;
        isa::wait_copies<kStages - 2>();
        if (left > kQuantizedDepth) decode(stage, tile);
      }
    };
    if (a.stages == 4) {
      sum(std::integral_constant<int, 4>{});
    } else if (a.stages == 3) {
      sum(std::integral_constant<int, 3>{});
    } else {
      sum(std::integral_constant<int, 2>{});
    }
    isa::wait_copies<0>();
    const ProductPlace again = Result::place_of(a);
    if (a.parts != nullptr) return Result::write_part(a, sums, again);
    isa::sync_block();
    Result::write(a, sums, tiles, again);
  }
};

}  // namespace mft::cuda::sm80
