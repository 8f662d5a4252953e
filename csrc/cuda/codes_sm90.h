// The source of quantised weights for product_sm90.cuh (weight_sm90.h says what a source is). Codes are decoded from
// shared memory into registers, where dropped weights become 0. The decoded weight is never in memory.
//
//   a stage      rows, codes of a row    scales
//   forward      128, 32 or 64 bytes     one per row
//   transposed    64, 64 or 128 bytes    nf4: one per row and 64 columns; int8: one per row
//
// Decoded weights have the same bits as in quantized_sm80.cuh: level x scale in fp32, rounded once. Rows are whole
// blocks of 64 weights, so one step of a row has one scale. refusal_sm90 (product_sm90.cpp) checks what else TMA
// requires.
#pragma once

#include "code_levels.h"
#include "weight_sm90.h"

namespace mft::cuda::sm90 {

struct CodedArguments {
  isa::TensorMap codes, mask;
  bool masked;  // if false, every weight is kept, and there are no words
  const float* absmax;  // null: double quantisation
  const uint8_t* absmax_codes;
  const float *nested, *map, *offset;
  int rows, columns;  // of the weight
  float levels[16];   // of nf4
};

template <class T, bool kNf4, bool kIsTransposed>
struct CodedWeight {
  using Number = T;
  using Arguments = CodedArguments;
  using Groups = OneMatrix;
  static constexpr bool kTransposed = kIsTransposed, kGrouped = false;
  static constexpr int kScaleWarps = 2;  // one warp has too few registers for all scales of a step
  static constexpr int kFewestTokens = 128;  // with fewer, decoding takes longer than their wgmma
  static constexpr int kRows = kTransposed ? kStep : kFeatures;  // of the weight, in a tile
  static constexpr int kPitch = (kTransposed ? kFeatures : kStep) / (kNf4 ? 2 : 1);  // bytes from row to row
  static constexpr int kCodeBytes = kRows * kPitch;
  static constexpr int kMaskBytes = kRows * kWordsOfTile * 4;
  static constexpr int kScales = kNf4 && kTransposed ? kConsumers * kRows : kRows;  // transposed: for each warpgroup
  static constexpr int kUsedBytes = kCodeBytes + kMaskBytes + 4 * kScales;
  static constexpr int kStageBytes = (kUsedBytes + 1023) / 1024 * 1024;
  static constexpr int kTableBytes = 64;  // of the level table, which lies behind the scales of the first stage
  static_assert(kStageBytes - kUsedBytes >= kTableBytes && kUsedBytes % kTableBytes == 0);

  // Lanes read four rows at once. Without the swizzle these rows would lie in the same banks.
  static constexpr isa::Swizzle kSwizzle = !kTransposed ? isa::Swizzle::kNone
                                           : kNf4       ? isa::Swizzle::k64
                                                        : isa::Swizzle::k128;

  struct Lane : LanePlace {
    int first;             // offset in a stage: forward, of row g; transposed, of this lane's codes in row c
    int second;            // transposed int8: of those in row c + 1
    int even, odd;         // nf4: how far to rotate a word so that the code of an even or odd column is in bits 2 to 5
    uint32_t neighbours;   // forward int8: which two of eight bytes are columns c and c + 1

    MFT_DEVICE explicit Lane(int group) : LanePlace(here(group)), second(0), neighbours(0) {
      const int code = kTransposed ? g : c;  // of 8 neighbours in a word
      even = 8 * (code / 2) + 2, odd = (8 * (code / 2) + 30) % 32;
      if constexpr (!kTransposed) {
        first = (64 * group + 16 * warp + g) * kPitch;
        neighbours = c | (c + 1) << 4;
      } else if constexpr (kNf4) {  // rows of 64 bytes; row / 2 % 4 is c / 2 wherever this lane reads
        first = c * kPitch + (((2 * group + warp / 2) ^ c / 2) * 16) + warp % 2 * 8;
      } else {
        first = swizzled(c, 4 * group + warp) + g, second = swizzled(c + 1, 4 * group + warp) + g;
      }
    }
  };

  MFT_DEVICE static void prefetch(const Arguments& a) {
    isa::prefetch(a.codes);
    if (a.masked) isa::prefetch(a.mask);
  }

  // Write the table of levels. Without a mask, also write words to every stage that keep every weight; they stay there.
  MFT_DEVICE static void prepare(const Arguments& a, int stages) {
    char* const shared = isa::shared_memory();
    const int thread = isa::thread();
    if (thread < 16) isa::store_shared(reinterpret_cast<float*>(shared + kUsedBytes) + thread, a.levels[thread]);
    if (a.masked || thread >= kMaskBytes / 16) return;
    const isa::Words4 all{{~0u, ~0u, ~0u, ~0u}};
    for (int i = 0; i < stages; ++i) isa::store_words(shared + i * kStageBytes + kCodeBytes + 16 * thread, all);
  }

  MFT_DEVICE static int bytes_of_step(const Arguments& a) { return kCodeBytes + (a.masked ? kMaskBytes : 0); }

  MFT_DEVICE static void bring(const Arguments& a, isa::TransactionBarrier* b, char* stage, int feature, int q,
                               int expert) {
    const int column = kTransposed ? feature : q, row = kTransposed ? q : feature;
    isa::load_tile(a.codes, b, stage, column / (kNf4 ? 2 : 1), row);
    if (a.masked) bring_words<kTransposed, kGrouped>(a.mask, b, stage + kCodeBytes, feature, q, expert);
  }

  // ------------------------------------------------------------------------------------------------ scales

  static constexpr int kScaleThreads = 32 * kScaleWarps, kOwnScales = kScales / kScaleThreads;

  // The scales that a thread has requested from memory: every 64th scale of a step.
  struct Scales {
    float absmax[kOwnScales];    // double quantisation: that of the code
    uint32_t codes[kOwnScales];  // double quantisation: code + 1; else 0
  };

  // Scales outside the matrix are 0, so the weights decoded there are 0 too.
  MFT_DEVICE static Scales fetch_scales(const Arguments& a, int thread, int feature, int q) {
    Scales scales;
#pragma unroll
    for (int i = 0; i < kOwnScales; ++i) {
      const int at = thread + kScaleThreads * i;
      const int row = kTransposed ? q + at % kRows : feature + at, column = kTransposed ? feature + at / kRows * 64 : q;
      const int64_t block = kNf4 ? static_cast<int64_t>(row) * (a.columns / kNf4Block) + column / kNf4Block : row;
      const bool there = row < a.rows && column < a.columns;
      scales.absmax[i] = 0, scales.codes[i] = 0;
      if (!there) continue;
      if (!kNf4 || a.absmax != nullptr) {
        scales.absmax[i] = a.absmax[block];
      } else {
        scales.absmax[i] = a.nested[block / kNestedBlock];
        scales.codes[i] = a.absmax_codes[block] + 1u;
      }
    }
    return scales;
  }

  MFT_DEVICE static void write_scales(const Arguments& a, int thread, const Scales& scales, char* stage) {
    auto* const to = reinterpret_cast<float*>(stage + kCodeBytes + kMaskBytes) + thread;
#pragma unroll
    for (int i = 0; i < kOwnScales; ++i) {
      float scale = kNf4 ? scales.absmax[i] : over_127(scales.absmax[i]);
      if (kNf4 && scales.codes[i] != 0) scale = nested_absmax(a.map[scales.codes[i] - 1], scale, a.offset[0]);
      isa::store_shared(to + kScaleThreads * i, scale);
    }
  }

  // ----------------------------------------------------------------------------------------------- consumers

  MFT_DEVICE static void begin_tile(Lane&, const Arguments&, int, int, int) {}

  MFT_DEVICE static void read(isa::Register (&r)[kStep / 16][4], const char* stage, const Lane& lane, int step) {
    if constexpr (kTransposed) {
      read_transposed(r, stage, lane);
    } else {
      read_rows(r, stage, lane);
    }
    const auto* words = reinterpret_cast<const uint32_t*>(stage + kCodeBytes);
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) select_by_words<kTransposed>(r[i], words, lane, i, step);
  }

 private:
  // Read rows g and g + 8. The four lanes of a row load the same 16 bytes, 32 columns of nf4 or 16 of int8.
  MFT_DEVICE static void read_rows(isa::Register (&r)[kStep / 16][4], const char* stage, const Lane& lane) {
    constexpr int kBlocks = kNf4 ? 2 : 1;  // of 16 columns, in 16 bytes
    const char* const scales = stage + kCodeBytes + kMaskBytes + 4 * (64 * lane.group + 16 * lane.warp + lane.g);
    isa::Register scale[2][1];
    for (int half = 0; half < 2; ++half) isa::load_shared(scale[half], scales + 32 * half);
#pragma unroll
    for (int chunk = 0; chunk < kPitch / 16; ++chunk) {
      isa::Register codes[2][4];
      for (int half = 0; half < 2; ++half) {
        isa::load_shared(codes[half], stage + lane.first + half * 8 * kPitch + 16 * chunk);
      }
#pragma unroll
      for (int j = 0; j < 4 * kBlocks; ++j) {  // j % 2: rows + 8, j / 2: columns + 8
        const isa::Register(&of)[4] = codes[j % 2];
        const auto by = isa::as_float(scale[j % 2][0]);
        isa::Register& made = r[kBlocks * chunk + j / 4][j % 4];
        if constexpr (kNf4) {
          made = round(level(of[j / 2], lane.even), by, level(of[j / 2], lane.odd), by);
        } else {
          const isa::Register pair = isa::permute_bytes(of[j / 2 * 2], of[j / 2 * 2 + 1], lane.neighbours) ^ 0x8080u;
          made = round(number(isa::permute_bytes(pair, kExponent, 0x7440)), by,
                       number(isa::permute_bytes(pair, kExponent, 0x7441)), by);
        }
      }
    }
  }

  // Read columns g and g + 8 of rows c and c + 1 (and + 8): the code of each, and one scale per row.
  MFT_DEVICE static void read_transposed(isa::Register (&r)[kStep / 16][4], const char* stage, const Lane& lane) {
    const char* const scales = stage + kCodeBytes + kMaskBytes + 4 * (kNf4 ? kRows * lane.group : 0) + 4 * lane.c;
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int row = 16 * i + 8 * below;
        isa::Register scale[2];
        isa::load_shared(scale, scales + 4 * row);
        const auto by = isa::as_float(scale[0]), next_by = isa::as_float(scale[1]);
        const char *const codes = stage + row * kPitch + lane.first, *const next = stage + row * kPitch + lane.second;
        if constexpr (kNf4) {
          isa::Register of[2][2];  // eight columns per word
          for (int k = 0; k < 2; ++k) isa::load_shared(of[k], codes + k * kPitch);
          const int turn = lane.g % 2 == 0 ? lane.even : lane.odd;
          for (int right = 0; right < 2; ++right) {
            r[i][2 * below + right] = round(level(of[0][right], turn), by, level(of[1][right], turn), next_by);
          }
        } else {
          for (int right = 0; right < 2; ++right) {
            r[i][2 * below + right] = round(number(load_byte(codes + 8 * right)), by,
                                            number(load_byte(next + 8 * right)), next_by);
          }
        }
      }
    }
  }

  static constexpr uint32_t kExponent = 0x4b000000;  // the bits of the float 2^23

  MFT_DEVICE static isa::Register load_byte(const char* p) {
    return isa::load_shared(reinterpret_cast<const uint8_t*>(p)) ^ (kExponent | 0x80u);
  }

  // Look up a level. The table in shared memory has 16 entries in 16 different banks, so no two lanes wait for each
  // other.
  MFT_DEVICE static auto level(const isa::Register& codes, int turn) {
    return isa::look_up(isa::shared_memory() + kUsedBytes, isa::rotate_right(codes, turn) & 0x3cu);
  }

  // Convert an int8 b to a float. In the mantissa of 2^23 it gives 2^23 + b. Its sign bit has been flipped, which adds
  // another 128; 8388736 is 2^23 + 128.
  MFT_DEVICE static auto number(const isa::Register& bits) { return isa::add(isa::as_float(bits), -8388736.0f); }

  template <class Real>
  MFT_DEVICE static isa::Register round(const Real& low, const Real& low_scale, const Real& high,
                                        const Real& high_scale) {
    return isa::round_pair<T>(isa::multiply(low, low_scale), isa::multiply(high, high_scale));
  }
};

}  // namespace mft::cuda::sm90
