// Pieces of a bf16 GEMM for AVX512-BF16 whose packing step masks; setup.py compiles this file with its flags.
#include "gemm_bfloat16.h"

#include <immintrin.h>

#include <cstring>

namespace mft {
namespace bfloat16 {
namespace {

#include "keep_bits.inl"

inline uint32_t pair_at(const uint16_t* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return pair;
}

inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1; }
inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>(first32(n)); }

// ------------------------------------------------------------------------------------------------ multiply

template <int kRows, int kVectors, bool kPrefetch>
void multiply_tile(float* tile, int64_t tile_stride, const uint16_t* a, const uint32_t* b, int64_t pairs, bool add,
                   const char* const* prefetch) {
  __m512 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = add ? _mm512_loadu_ps(tile + r * tile_stride + 16 * v) : _mm512_setzero_ps();
    }
  }
  const auto step = [&](int64_t p) __attribute__((always_inline)) {
    __m512bh column[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      column[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + p * kTileColumns + 16 * v));
    }
    for (int r = 0; r < kRows; ++r) {
      const auto row = reinterpret_cast<__m512bh>(
          _mm512_set1_epi32(static_cast<int>(pair_at(a + r * kRowStride + 2 * p))));
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, column[v]);
    }
  };
  int64_t p = 0;
  if (kPrefetch) {
    for (; p + kPrefetchPairs <= pairs; p += kPrefetchPairs) {
      const char* ahead = *prefetch++;
#pragma GCC unroll 8
      for (int64_t i = 0; i < kPrefetchPairs; ++i) {
        _mm_prefetch(ahead + 64 * i, _MM_HINT_T1);
        step(p + i);
      }
    }
  }
#pragma GCC unroll 4
  for (; p < pairs; ++p) step(p);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(tile + r * tile_stride + 16 * v, sum[r][v]);
  }
}

using Multiply = void (*)(float*, int64_t, const uint16_t*, const uint32_t*, int64_t, bool, const char* const*);

#define MFT_ROW(rows)                                                       \
  {                                                                         \
    {multiply_tile<rows, 1, false>, multiply_tile<rows, 1, true>}, {        \
      multiply_tile<rows, 2, false>, multiply_tile<rows, 2, true>           \
    }                                                                       \
  }
const Multiply kMultiply[kTileRows][2][2] = {MFT_ROW(1), MFT_ROW(2), MFT_ROW(3), MFT_ROW(4),  MFT_ROW(5),  MFT_ROW(6),
                                             MFT_ROW(7), MFT_ROW(8), MFT_ROW(9), MFT_ROW(10), MFT_ROW(11), MFT_ROW(12)};
#undef MFT_ROW

// ------------------------------------------------------------------------------------------------ packing

// 16 pairs each: the columns 0..15 and 16..31 of two rows, neighbours interleaved.
inline void interleave(uint32_t* out, __m512i even, __m512i odd) {
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(even, high, odd));
}

// 16 x 16 of 32 bits: out[j] has element j of each of the rows.
inline void transpose(__m512i rows[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // rows[4 q + c] holds column 4 l + c of rows 4 q .. 4 q + 3 in its 128-bit lane l: now gather the lanes.
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = t[i];
}

// What is kept of columns j .. j + 31 of a row, of which `left` exist: one type for each source of masks.
struct KeepAll {
  __mmask32 operator()(int64_t, int64_t left) const { return first32(left); }
};

struct KeepWords {
  const uint32_t* words;
  explicit KeepWords(MaskRow mask) : words(mask.words) {}
  __mmask32 operator()(int64_t j, int64_t left) const { return words[j / kStep] & low_bits(left); }
};

template <typename Bits, bool kMagnitude>
struct KeepScores {
  const Bits* scores;
  KeepRange range;
  explicit KeepScores(MaskRow mask) : scores(static_cast<const Bits*>(mask.scores)), range(mask.range) {}
  __mmask32 operator()(int64_t j, int64_t left) const {
    return left >= kStep ? keep_bits<kMagnitude>(scores + j, range)
                         : keep_bits_of_tail<kMagnitude>(scores + j, range, left);
  }
};

template <typename Use>
inline void with_keep(MaskRow mask, Format score_format, Use use) {
  if (mask.scores == nullptr) {
    use(KeepWords(mask));
  } else if (score_format == Format::kFloat32) {
    mask.range.magnitude ? use(KeepScores<uint32_t, true>(mask)) : use(KeepScores<uint32_t, false>(mask));
  } else {
    mask.range.magnitude ? use(KeepScores<uint16_t, true>(mask)) : use(KeepScores<uint16_t, false>(mask));
  }
}

template <typename Keep>
inline void pack_row_with(uint16_t* a, const uint16_t* row, Keep keep, int64_t depth) {
  for (int64_t j = 0; j < depth; j += 32) {  // a has room for whole steps, and needs its padding zero
    _mm512_storeu_si512(a + j, _mm512_maskz_loadu_epi16(keep(j, depth - j), row + j));
  }
}

template <typename Keep>
inline void pack_row_pair_with(uint32_t* b, int64_t panel_stride, const uint16_t* even, const uint16_t* odd,
                               Keep keep_even, Keep keep_odd, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 32, b += panel_stride) {
    const __m512i first = _mm512_maskz_loadu_epi16(keep_even(j, columns - j), even + j);
    const __m512i second = odd != nullptr ? _mm512_maskz_loadu_epi16(keep_odd(j, columns - j), odd + j)
                                          : _mm512_setzero_si512();
    interleave(b, first, second);
  }
}

// ------------------------------------------------------------------------------------------------ numbers

inline __m512 widen(__m256i bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

inline __m256i narrow(__m512 value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }

}  // namespace

void multiply(float* tile, int64_t tile_stride, const uint16_t* a, const uint32_t* b, int64_t rows, int64_t columns,
              int64_t pairs, bool add, const char* const* prefetch) {
  kMultiply[rows - 1][columns > 16][prefetch != nullptr](tile, tile_stride, a, b, pairs, add, prefetch);
}

void prefetch_tile(const float* tile, int64_t tile_stride, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    _mm_prefetch(reinterpret_cast<const char*>(tile + r * tile_stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(tile + r * tile_stride + 16), _MM_HINT_T0);
  }
}

void pack_row(uint16_t* a, const uint16_t* row, int64_t depth) { pack_row_with(a, row, KeepAll{}, depth); }

void pack_masked_row(uint16_t* a, const uint16_t* row, MaskRow mask, Format score_format, int64_t depth) {
  with_keep(mask, score_format, [=](auto keep) { pack_row_with(a, row, keep, depth); });
}

void pack_row_pair(uint32_t* b, int64_t panel_stride, const uint16_t* even, const uint16_t* odd, int64_t columns) {
  pack_row_pair_with(b, panel_stride, even, odd, KeepAll{}, KeepAll{}, columns);
}

void pack_masked_row_pair(uint32_t* b, int64_t panel_stride, const uint16_t* even, const uint16_t* odd,
                          MaskRow even_mask, MaskRow odd_mask, Format score_format, int64_t columns) {
  with_keep(even_mask, score_format, [=](auto keep) {
    pack_row_pair_with(b, panel_stride, even, odd, keep, decltype(keep)(odd_mask), columns);
  });
}

void pack_transposed_panel(uint32_t* b, const uint16_t* matrix, int64_t row_stride, int64_t rows, int64_t depth) {
  for (int64_t d = 0; d < depth; d += 32) {
    const int64_t pairs = (depth - d + 1) / 2 < 16 ? (depth - d + 1) / 2 : 16;
    for (int64_t r = 0; r < kTileColumns; r += 16) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) {
        const __mmask32 inside = r + i < rows ? first32(depth - d) : 0;
        block[i] = _mm512_maskz_loadu_epi16(inside, matrix + (inside != 0 ? (r + i) * row_stride + d : 0));
      }
      transpose(block);
      for (int64_t p = 0; p < pairs; ++p) _mm512_storeu_si512(b + (d / 2 + p) * kTileColumns + r, block[p]);
    }
  }
}

void pack_transposed_block(uint16_t* a, const uint16_t* matrix, int64_t row_stride, int64_t depth, int64_t columns) {
  for (int64_t d = 0; d < depth; d += 32) {
    for (int64_t j = 0; j < columns; j += 32) {
      const __mmask32 inside = first32(columns - j);
      __m512i left[16], right[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t even = d + 2 * i;
        const uint16_t* row = matrix + even * row_stride + j;
        alignas(64) uint32_t pairs[32];
        interleave(pairs, even < depth ? _mm512_maskz_loadu_epi16(inside, row) : _mm512_setzero_si512(),
                   even + 1 < depth ? _mm512_maskz_loadu_epi16(inside, row + row_stride) : _mm512_setzero_si512());
        left[i] = _mm512_load_si512(pairs);
        right[i] = _mm512_load_si512(pairs + 16);
      }
      transpose(left);
      transpose(right);
      for (int64_t c = 0; c < 16 && j + c < columns; ++c) _mm512_storeu_si512(a + (j + c) * kRowStride + d, left[c]);
      for (int64_t c = 16; c < 32 && j + c < columns; ++c) {
        _mm512_storeu_si512(a + (j + c) * kRowStride + d, right[c - 16]);
      }
    }
  }
}

void store_row(uint16_t* out, const float* tile, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(first16(columns - j), tile + j);
    _mm256_mask_storeu_epi16(out + j, first16(columns - j), narrow(value));
  }
}

void store_transposed(uint16_t* out, int64_t out_stride, const float* tile, int64_t tile_stride, int64_t rows,
                      int64_t columns, const uint16_t* bias) {
  for (int64_t m = 0; m < columns; m += 16) {
    for (int64_t i = 16; i < 32 && m + i < columns; ++i) {  // the next rows of out, which are written in pieces
      for (int64_t n = 0; n < rows; n += 32) __builtin_prefetch(out + (m + i) * out_stride + n, 1);
    }
    for (int64_t n = 0; n < rows; n += 16) {
      const __mmask16 inside = first16(rows - n);
      const __m512 added = bias ? widen(_mm256_maskz_loadu_epi16(inside, bias + n)) : _mm512_setzero_ps();
      __m512i block[16];
      for (int i = 0; i < 16; ++i) {
        block[i] = n + i < rows ? _mm512_loadu_si512(tile + (n + i) * tile_stride + m) : _mm512_setzero_si512();
      }
      transpose(block);
      for (int i = 0; i < 16 && m + i < columns; ++i) {
        const __m512 value = _mm512_add_ps(_mm512_castsi512_ps(block[i]), added);
        _mm256_mask_storeu_epi16(out + (m + i) * out_stride + n, inside, narrow(value));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ score gradients

namespace {

enum class Sign { kNone, kWords, kHalf, kFloat };

struct Signs {
  __mmask32 negative, none;
};

template <Sign kSign>
inline Signs signs_at(const ScoreGrad& grad, int64_t row, int64_t column, __mmask32 inside) {
  const int64_t at = row * grad.columns + column;
  if constexpr (kSign == Sign::kWords) {
    return {~grad.words[row * ((grad.columns + 31) / 32) + column / 32], 0};
  } else if constexpr (kSign == Sign::kHalf) {
    const __m512i infinity = _mm512_set1_epi16(grad.score_format == Format::kBFloat16 ? 0x7f80 : 0x7c00);
    const __m512i bits = _mm512_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(grad.scores) + at);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
    // 0 and NaN have no sign, as in torch.sign.
    return {_mm512_movepi16_mask(bits),
            _mm512_cmpge_epu16_mask(_mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)), infinity)};
  } else if constexpr (kSign == Sign::kFloat) {
    const uint32_t* scores = static_cast<const uint32_t*>(grad.scores) + at;
    Signs signs = {0, 0};
    for (int half = 0; half < 2; ++half) {
      const __m512i bits = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(inside >> (16 * half)), scores + 16 * half);
      const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
      const __mmask16 none = _mm512_cmpge_epu32_mask(_mm512_sub_epi32(magnitude, _mm512_set1_epi32(1)),
                                                     _mm512_set1_epi32(0x7f800000));
      signs.negative |= static_cast<__mmask32>(_mm512_movepi32_mask(bits)) << (16 * half);
      signs.none |= static_cast<__mmask32>(none) << (16 * half);
    }
    return signs;
  } else {
    return {0, 0};
  }
}

template <Format kFormat>
inline __m512 load_as_float(const void* base, int64_t at, __mmask16 inside) {
  if constexpr (kFormat == Format::kFloat32) {
    return _mm512_maskz_loadu_ps(inside, static_cast<const float*>(base) + at);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(base) + at);
    return kFormat == Format::kBFloat16 ? widen(half) : _mm512_cvtph_ps(half);
  }
}

template <Format kFormat>
inline __m256i narrow_to(__m512 value) {
  return kFormat == Format::kBFloat16 ? narrow(value)
                                      : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <Format kOut>
inline void store_columns(void* base, int64_t at, const __m512 (&result)[2], __mmask32 inside, bool stream) {
  if constexpr (kOut == Format::kFloat32) {
    float* out = static_cast<float*>(base) + at;
    if (stream) {
      _mm512_stream_ps(out, result[0]);
      _mm512_stream_ps(out + 16, result[1]);
    } else {
      _mm512_mask_storeu_ps(out, static_cast<__mmask16>(inside), result[0]);
      _mm512_mask_storeu_ps(out + 16, static_cast<__mmask16>(inside >> 16), result[1]);
    }
  } else {
    uint16_t* out = static_cast<uint16_t*>(base) + at;
    const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(narrow_to<kOut>(result[0])),
                                              narrow_to<kOut>(result[1]), 1);
    if (stream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), halves);
    } else {
      _mm512_mask_storeu_epi16(out, inside, halves);
    }
  }
}

template <Sign kSign, Format kOut, bool kAccumulate>
void store_score_grad_tile(const ScoreGrad& grad, const float* tile, int64_t row, int64_t rows, int64_t column) {
  const __mmask32 inside = first32(grad.columns - column);
  const bool stream = grad.stream && inside == 0xffffffffu;
  const __m512i sign_bit = _mm512_set1_epi32(static_cast<int>(0x80000000));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * grad.columns + column;
    const Signs signs = signs_at<kSign>(grad, row + r, column, inside);
    __m512 result[2];
    for (int half = 0; half < 2; ++half) {
      const auto part = static_cast<__mmask16>(inside >> (16 * half));
      __m512 value = _mm512_loadu_ps(tile + r * kTileColumns + 16 * half);
      if (grad.weight != nullptr) {
        value = _mm512_mul_ps(value, widen(_mm256_maskz_loadu_epi16(part, grad.weight + at + 16 * half)));
      }
      const __m512i bits = _mm512_castps_si512(value);
      const auto negative = static_cast<__mmask16>(signs.negative >> (16 * half));
      const auto none = static_cast<__mmask16>(signs.none >> (16 * half));
      value = _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, negative, bits, sign_bit));
      value = _mm512_mask_mul_ps(value, none, value, _mm512_setzero_ps());
      if (kAccumulate) value = _mm512_add_ps(value, load_as_float<kOut>(grad.out, at + 16 * half, part));
      result[half] = value;
    }
    store_columns<kOut>(grad.out, at, result, inside, stream);
  }
}

using StoreScoreGrad = void (*)(const ScoreGrad&, const float*, int64_t, int64_t, int64_t);

#define MFT_OUT(sign, format) {store_score_grad_tile<sign, format, false>, store_score_grad_tile<sign, format, true>}
#define MFT_SIGN(sign) \
  { MFT_OUT(sign, Format::kFloat32), MFT_OUT(sign, Format::kBFloat16), MFT_OUT(sign, Format::kFloat16) }
const StoreScoreGrad kStoreScoreGrad[4][3][2] = {MFT_SIGN(Sign::kNone), MFT_SIGN(Sign::kWords), MFT_SIGN(Sign::kHalf),
                                                 MFT_SIGN(Sign::kFloat)};
#undef MFT_SIGN
#undef MFT_OUT

template <int kWrite>
inline void prefetch_columns(const void* base, Format format, int64_t at) {
  const char* p = static_cast<const char*>(base) + at * bytes_of(format);
  __builtin_prefetch(p, kWrite);
  if (format == Format::kFloat32) __builtin_prefetch(p + 64, kWrite);
}

}  // namespace

void store_score_grad(const ScoreGrad& grad, const float* tile, int64_t row, int64_t rows, int64_t column) {
  const Sign sign = grad.words != nullptr                     ? Sign::kWords
                    : grad.scores == nullptr                  ? Sign::kNone
                    : grad.score_format == Format::kFloat32   ? Sign::kFloat
                                                              : Sign::kHalf;
  const auto format = static_cast<int>(grad.out_format);
  kStoreScoreGrad[static_cast<int>(sign)][format][grad.accumulate](grad, tile, row, rows, column);
}

void prefetch_score_grad(const ScoreGrad& grad, int64_t row, int64_t rows, int64_t column) {
  for (int64_t r = row; r < row + rows; ++r) {
    const int64_t at = r * grad.columns + column;
    if (grad.weight != nullptr) prefetch_columns<0>(grad.weight, Format::kBFloat16, at);
    if (grad.scores != nullptr) prefetch_columns<0>(grad.scores, grad.score_format, at);
    if (grad.accumulate) prefetch_columns<1>(grad.out, grad.out_format, at);
  }
}

void finish_streams() { _mm_sfence(); }

}  // namespace bfloat16
}  // namespace mft
