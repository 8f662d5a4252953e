// The tiles of AMX: eight registers of 16 rows of 64 bytes each. Every instruction takes whole tiles.
//
// With MFT_EMULATED_TILES the same functions are plain code, so that their callers run on any machine. They form sums
// as the instruction does: even and odd products are added separately from 0, then both are added to the tile.
// Subnormal operands and results count as 0.
#pragma once

#include <cstdint>
#include <cstring>

namespace mft {
namespace {  // two files include this, with different bodies

constexpr int kTileRegisters = 8, kTileRegisterRows = 16, kTileRegisterBytes = 64;

#if !defined(MFT_EMULATED_TILES)

// Not the compiler's intrinsics: those of GCC 12 take only literal numbers, and do not declare that they read and write
// memory.

// Gives every tile 16 rows of 64 bytes. It costs tens of cycles. tile_end() restores the thread's state.
inline void tile_begin() {
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } configuration;
  for (int i = 0; i < kTileRegisters; ++i) {
    configuration.row_bytes[i] = kTileRegisterBytes;
    configuration.rows[i] = kTileRegisterRows;
  }
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}

inline void tile_end() { asm volatile("tilerelease"); }

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Loads rows that are `stride` bytes apart.
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// sum (16 x 16 fp32) += a (16 x 32 bf16) @ b (16 x 16 pairs of bf16: pair k of column n at row k)
template <int kSum, int kA, int kB>
inline void tile_add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

#else

struct EmulatedTile {
  uint32_t at[kTileRegisterRows][kTileRegisterBytes / 4];
};

thread_local EmulatedTile emulated_tiles[kTileRegisters];
thread_local bool emulated_tiles_configured = false;

inline EmulatedTile& emulated_tile(int tile) {
  if (!emulated_tiles_configured) __builtin_trap();  // as the processor does
  return emulated_tiles[tile];
}

inline void tile_begin() {
  emulated_tiles_configured = true;
  std::memset(emulated_tiles, 0, sizeof emulated_tiles);
}

inline void tile_end() { emulated_tiles_configured = false; }

template <int kTile>
inline void tile_zero() {
  std::memset(&emulated_tile(kTile), 0, sizeof(EmulatedTile));
}

template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < kTileRegisterRows; ++r) {
    std::memcpy(emulated_tile(kTile).at[r], static_cast<const char*>(from) + r * stride, kTileRegisterBytes);
  }
}

template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < kTileRegisterRows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, emulated_tile(kTile).at[r], kTileRegisterBytes);
  }
}

inline float emulated_number(uint32_t bits) {
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float emulated_result(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return emulated_number(bits);
}

template <int kSum, int kA, int kB>
inline void tile_add_product() {
  EmulatedTile &sum = emulated_tile(kSum), &a = emulated_tile(kA), &b = emulated_tile(kB);
  for (int m = 0; m < kTileRegisterRows; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < kTileRegisterRows; ++k) {
      const float a_even = emulated_number(a.at[m][k] << 16), a_odd = emulated_number(a.at[m][k] & 0xffff0000);
      for (int n = 0; n < 16; ++n) {
        even[n] = emulated_result(__builtin_fmaf(a_even, emulated_number(b.at[k][n] << 16), even[n]));
        odd[n] = emulated_result(__builtin_fmaf(a_odd, emulated_number(b.at[k][n] & 0xffff0000), odd[n]));
      }
    }
    for (int n = 0; n < 16; ++n) {
      const float both = emulated_result(even[n] + odd[n]);
      const float result = emulated_result(emulated_number(sum.at[m][n]) + both);
      std::memcpy(&sum.at[m][n], &result, sizeof result);
    }
  }
}

#endif

}  // namespace
}  // namespace mft
