// 8 neighbours of a row of any float type, read and written 16 bytes at a time if the rows allow it.
#pragma once

#include "tile_sm80.h"

namespace mft::cuda::sm80 {

// 8 neighbours of a row as they lie in memory, with zeros behind the row's end.
struct Eight {
  isa::Words4 half[2];  // 16-bit types use only the first

  MFT_DEVICE static Eight of(const View& view, int row, int column) {
    Eight v = {};
    const char* const from = view.at(row, column);
    const bool wide = view.type == Type::kFloat32;
    if (view.chunked && column + 8 <= view.columns) {
      v.half[0] = load<isa::Words4>(from);
      if (wide) v.half[1] = load<isa::Words4>(from + kChunkBytes);
    } else {
      for (int i = 0; i < 8; ++i) {
        if (column + i >= view.columns) continue;
        if (wide) {
          v.half[i / 4].words[i % 4] = load<uint32_t>(from + 4 * i);
        } else {
          v.half[0].words[i / 2] |= static_cast<uint32_t>(load<uint16_t>(from + 2 * i)) << (16 * (i % 2));
        }
      }
    }
    return v;
  }

  MFT_DEVICE void widen(float (&to)[8], Type type) const {
    for (int i = 0; i < 8; ++i) {
      const auto bits = static_cast<uint16_t>(half[0].words[i / 2] >> (16 * (i % 2)));
      to[i] = type == Type::kFloat32    ? isa::as_float(half[i / 4].words[i % 4])
              : type == Type::kBFloat16 ? isa::widen(BFloat16{bits})
                                        : isa::widen(Float16{bits});
    }
  }

  MFT_DEVICE static void write(const View& view, int row, int column, const float (&v)[8]) {
    Eight rounded;
    const bool wide = view.type == Type::kFloat32;
    for (int i = 0; i < 8 && wide; ++i) rounded.half[i / 4].words[i % 4] = isa::as_bits(v[i]);
    for (int i = 0; i < 8 && !wide; i += 2) {
      rounded.half[0].words[i / 2] = view.type == Type::kBFloat16 ? isa::round_pair<BFloat16>(v[i], v[i + 1])
                                                                  : isa::round_pair<Float16>(v[i], v[i + 1]);
    }
    char* const to = view.at(row, column);
    if (view.chunked && column + 8 <= view.columns) {
      store(to, rounded.half[0]);
      if (wide) store(to + kChunkBytes, rounded.half[1]);
    } else {
      for (int i = 0; i < 8; ++i) {
        if (column + i >= view.columns) continue;
        if (wide) {
          store(to + 4 * i, rounded.half[i / 4].words[i % 4]);
        } else {
          store(to + 2 * i, static_cast<uint16_t>(rounded.half[0].words[i / 2] >> (16 * (i % 2))));
        }
      }
    }
  }
};

// Add 8 neighbours in fp32, which begin at a multiple of 16 bytes.
MFT_DEVICE void add_eight(float (&sum)[8], const float* from) {
  for (int half = 0; half < 2; ++half) {
    const auto four = load<isa::Words4>(reinterpret_cast<const char*>(from + 4 * half));
    for (int i = 0; i < 4; ++i) sum[4 * half + i] += isa::as_float(four.words[i]);
  }
}

}  // namespace mft::cuda::sm80
