// The source of quantised weights for decode_sm80. Codes go from memory to registers, are decoded there, and become an
// operand of mma.sync. For any GPU from sm_80 on. code_levels.h defines the codes.
//
//            unit: 128 columns (nf4)     A lane loads 16 bytes of codes from row g and 16 from row g + 8: 32 columns of
//          +-------+-----+-----+-----+   nf4, or 16 of int8. So four lanes hold a unit of 128 or 64 columns.
//    row g | q = 0 |  1  |  2  |  3  |   Piece s of a unit is word s of each lane's codes (in int8, words 2 s and
//          +-------+-----+-----+-----+   2 s + 1): 8 columns per lane. `in` lies in shared memory in the order of the
//                                        pieces.
//
// For a unit and a row, a lane needs one word of the mask (int8: half a word) and one scale. It loads both itself. Lanes
// exchange nothing, and no decoded weight is ever in shared memory.
//
// Forward only. In d_x the depth runs down the rows of the weight, so neighbours in depth lie in different rows of
// codes. There quantized_sm80 decodes them into shared memory and transposes them, also for few tokens. Speed: not
// measured.
#pragma once

#include "codes_sm80.h"
#include "decode_sm80.cuh"

namespace mft::cuda::sm80 {

constexpr int kCodesTableBytes = 256;  // of the level table, which is the first thing in shared memory

struct DecodeCodesArguments : DecodeArguments {
  CodesArguments codes;
};

// kNested: absmax is itself in codes (double quantisation).
template <class T, bool kNf4, bool kNested>
class CodesSource {
 public:
  using Arguments = DecodeCodesArguments;
  static constexpr int kPieces = decode_codes_pieces(kNf4), kAhead = kDecodeCodesAhead;
  static constexpr int kTableBytes = kCodesTableBytes;
  static constexpr int blocks(int tiles, int row_bits) { return decode_codes_blocks(kNf4, tiles, row_bits); }

  MFT_DEVICE CodesSource(const Arguments& a, const DecodePlace& place) : left_(place.end - place.column) {
    if (kNf4 && isa::thread() < 16) store(table() + 4 * isa::thread(), a.codes.levels[isa::thread()]);
    for (int i = 0; i < 2; ++i) {
      const int64_t first = static_cast<int64_t>(place.rows[i]) * a.weight.columns + place.column;
      group_[i] = static_cast<uint32_t>(first / kColumns);
      if constexpr (!kNf4) scales_[i] = over_127(a.codes.absmax[place.rows[i]]);
    }
    prefetch(a);
  }

  MFT_DEVICE void load(int j, const Arguments& a) {
    const CodesArguments& from = a.codes;
    const bool there = left_ > 0;
    for (int i = 0; i < 2; ++i) {
      codes_[j][i] = there ? isa::load_streaming(from.codes + int64_t{kChunkBytes} * group_[i]) : isa::Words4{};
      words_[j][i] = there ? ~0u : 0;
      if (there && from.words != nullptr) words_[j][i] = load_word(from.words, group_[i]);
      if constexpr (kNf4) {
        const uint32_t block = group_[i] / (kNf4Block / kColumns);
        if (there) absmax_[j][i] = kNested ? from.map[absmax_codes_[i]] : from.absmax[block];
        if (there && kNested) nested_[j][i] = from.nested[block / kNestedBlock];
      }
      group_[i] += a.step_columns / kColumns;
    }
    left_ -= a.step_columns;
    prefetch(a);
  }

  MFT_DEVICE void ask(int, const DecodePlace&, const Arguments&) {}

  MFT_DEVICE void select(uint32_t (&kept)[2][4], int j, int piece, const Arguments& a) {
    for (int i = 0; i < 2; ++i) {
      const uint32_t (&codes)[4] = codes_[j][i].words;
      float numbers[8];
      if constexpr (kNf4) {
        if (piece == 0) {
          scales_[i] = kNested ? nested_absmax(absmax_[j][i], nested_[j][i], a.codes.offset[0]) : absmax_[j][i];
        }
        levels_of(numbers, table(), codes[piece]);
      } else {
        numbers_of(numbers, codes[2 * piece], codes[2 * piece + 1]);
      }
      const uint32_t word = kNf4 ? words_[j][i] : words_[j][0] | words_[j][1] << 16;  // half a word of each row
      select_eight<T>(kept[i], numbers, [&](int) { return scales_[i]; }, word, kNf4 ? piece : 2 * i + piece);
    }
  }

 private:
  static constexpr int kColumns = 8 * kPieces;  // of a group: a lane's share of a unit in one row

  MFT_DEVICE static char* table() { return isa::shared_memory(); }

  MFT_DEVICE static uint32_t load_word(const uint32_t* words, uint32_t group) {
    if constexpr (kNf4) {
      return words[group];
    } else {
      return sm80::load<uint16_t>(reinterpret_cast<const char*>(words) + int64_t{2} * group);
    }
  }

  // Load the code of an absmax one unit before the absmax itself.
  MFT_DEVICE void prefetch(const Arguments& a) {
    if constexpr (kNested) {
      for (int i = 0; i < 2; ++i) {
        if (left_ > 0) absmax_codes_[i] = a.codes.absmax_codes[group_[i] / (kNf4Block / kColumns)];
      }
    }
  }

  uint32_t group_[2];  // of the next unit, counted over the whole matrix
  int left_;           // columns left, counted from the lane's first in the next unit
  isa::Words4 codes_[kAhead][2];
  uint32_t words_[kAhead][2];
  float absmax_[kAhead][2], nested_[kAhead][2];  // of nf4
  uint32_t absmax_codes_[2] = {};                // of the next unit
  float scales_[2];                              // of the unit that select() reads
};

}  // namespace mft::cuda::sm80
