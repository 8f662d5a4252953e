// Shared parts of the AVX-512 tables of gemm.h: masks of 32 columns, transposition, multiplication by vectors, and the
// storing of finished tiles.
//
// Included into an anonymous namespace of namespace mft, after gemm.h, <cstring> and <immintrin.h>.

#include "keep_bits.inl"

inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1; }
inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>(first32(n)); }
inline __mmask16 half_of(__mmask32 mask, int half) { return static_cast<__mmask16>(mask >> (16 * half)); }

template <typename Element>
inline const Element* as(const void* memory) {
  return static_cast<const Element*>(memory);
}

// ------------------------------------------------------------------------------------------------ masks

// One type per source of masks. Each returns which of columns j .. j + 31 of a row are kept; `left` of them exist.
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
  explicit KeepScores(MaskRow mask) : scores(as<Bits>(mask.scores)), range(mask.range) {}
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

// ------------------------------------------------------------------------------------------------ numbers

inline __m512 widen(__m256i bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

inline __m256i narrow(__m512 value) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

template <Format kFormat>
inline __m512 load_as_float(const void* base, int64_t at, __mmask16 inside) {
  if constexpr (kFormat == Format::kFloat32) {
    return _mm512_maskz_loadu_ps(inside, as<float>(base) + at);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(inside, as<uint16_t>(base) + at);
    return kFormat == Format::kBFloat16 ? widen(half) : _mm512_cvtph_ps(half);
  }
}

template <Format kFormat>
inline __m256i narrow_to(__m512 value) {
  return kFormat == Format::kBFloat16 ? narrow(value)
                                      : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <Format kFormat>
inline void store_float(void* base, int64_t at, __mmask16 inside, __m512 value) {
  if constexpr (kFormat == Format::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(base) + at, inside, value);
  } else {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(base) + at, inside, narrow_to<kFormat>(value));
  }
}

// Transposes 16 x 16 elements of 32 bits in place: rows[j] becomes element j of each row.
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

// ------------------------------------------------------------------------------------------------ multiplication

constexpr int64_t kPrefetchGroups = 8;  // one line per group: 22 GB/s per core at full speed

// The sums of a tile stay in registers, 24 of 32 at 12 rows. Step::add_product(sum, row, column) adds one group's
// product.
template <typename Step, int kRows, int kVectors, bool kPrefetch>
void multiply_tile(float* tile, int64_t tile_stride, const uint32_t* a, const uint32_t* b, int64_t groups, bool add,
                   const char* const* prefetch) {
  __m512 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = add ? _mm512_loadu_ps(tile + r * tile_stride + 16 * v) : _mm512_setzero_ps();
    }
  }
  const auto step = [&](int64_t g) __attribute__((always_inline)) {
    __m512i column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = _mm512_loadu_si512(b + g * kTileColumns + 16 * v);
    for (int r = 0; r < kRows; ++r) {
      const __m512i row = _mm512_set1_epi32(static_cast<int>(a[r * kRowStride + g]));
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Step::add_product(sum[r][v], row, column[v]);
    }
  };
  int64_t g = 0;
  if (kPrefetch) {
    for (; g + kPrefetchGroups <= groups; g += kPrefetchGroups) {
      const char* ahead = *prefetch++;
#pragma GCC unroll 8
      for (int64_t i = 0; i < kPrefetchGroups; ++i) {
        _mm_prefetch(ahead + 64 * i, _MM_HINT_T1);
        step(g + i);
      }
    }
  }
#pragma GCC unroll 4
  for (; g < groups; ++g) step(g);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(tile + r * tile_stride + 16 * v, sum[r][v]);
  }
}

using Multiply = void (*)(float*, int64_t, const uint32_t*, const uint32_t*, int64_t, bool, const char* const*);

#define MFT_ROW(rows)                                                                     \
  {                                                                                       \
    {multiply_tile<Step, rows, 1, false>, multiply_tile<Step, rows, 1, true>}, {          \
      multiply_tile<Step, rows, 2, false>, multiply_tile<Step, rows, 2, true>             \
    }                                                                                     \
  }
constexpr int64_t kVectorTileRows = 12;
template <typename Step>
const Multiply kMultiply[kVectorTileRows][2][2] = {MFT_ROW(1), MFT_ROW(2),  MFT_ROW(3),  MFT_ROW(4),
                                                   MFT_ROW(5), MFT_ROW(6),  MFT_ROW(7),  MFT_ROW(8),
                                                   MFT_ROW(9), MFT_ROW(10), MFT_ROW(11), MFT_ROW(12)};
#undef MFT_ROW

template <typename Step>
void multiply_vectors(float* tile, int64_t tile_stride, const uint32_t* a, const uint32_t* b, int64_t rows,
                      int64_t columns, int64_t groups, bool add, const char* const* prefetch) {
  kMultiply<Step>[rows - 1][columns > 16][prefetch != nullptr](tile, tile_stride, a, b, groups, add, prefetch);
}

void prefetch_tile(const float* tile, int64_t tile_stride, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    _mm_prefetch(reinterpret_cast<const char*>(tile + r * tile_stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(tile + r * tile_stride + 16), _MM_HINT_T0);
  }
}

// ------------------------------------------------------------------------------------------------ finished tiles

template <Format kFormat>
void store_row(void* out, const float* tile, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 16) {
    const __mmask16 inside = first16(columns - j);
    store_float<kFormat>(out, j, inside, _mm512_maskz_loadu_ps(inside, tile + j));
  }
}

template <Format kFormat>
void store_transposed(void* out, int64_t out_stride, const float* tile, int64_t tile_stride, int64_t rows,
                      int64_t columns, const void* bias) {
  constexpr int64_t kLine = 64 / bytes_of(kFormat);
  for (int64_t m = 0; m < columns; m += 16) {
    for (int64_t i = 16; i < 32 && m + i < columns; ++i) {  // the next rows of out, which are written in pieces
      for (int64_t n = 0; n < rows; n += kLine) {
        __builtin_prefetch(static_cast<char*>(out) + ((m + i) * out_stride + n) * bytes_of(kFormat), 1);
      }
    }
    for (int64_t n = 0; n < rows; n += 16) {
      const __mmask16 inside = first16(rows - n);
      const __m512 added = bias ? load_as_float<kFormat>(bias, n, inside) : _mm512_setzero_ps();
      __m512i block[16];
      for (int i = 0; i < 16; ++i) {
        block[i] = n + i < rows ? _mm512_loadu_si512(tile + (n + i) * tile_stride + m) : _mm512_setzero_si512();
      }
      transpose(block);
      for (int i = 0; i < 16 && m + i < columns; ++i) {
        store_float<kFormat>(out, (m + i) * out_stride + n, inside, _mm512_add_ps(_mm512_castsi512_ps(block[i]), added));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ score gradients

enum class Sign { kNone, kWords, kHalf, kFloat };

// The signs of 32 columns: which are negative, which have no sign, and 16 bits per column with the sign in the highest.
struct Signs {
  __mmask32 negative, none;
  __m512i halves;
};

template <Sign kSign>
inline Signs signs_at(const ScoreGrad& grad, int64_t row, int64_t column, __mmask32 inside) {
  const int64_t at = row * grad.columns + column;
  if constexpr (kSign == Sign::kWords) {
    const __mmask32 negative = ~grad.words[row * ((grad.columns + 31) / 32) + column / 32];
    return {negative, 0, _mm512_movm_epi16(negative)};
  } else if constexpr (kSign == Sign::kHalf) {
    const __m512i infinity = _mm512_set1_epi16(grad.score_format == Format::kBFloat16 ? 0x7f80 : 0x7c00);
    const __m512i bits = _mm512_maskz_loadu_epi16(inside, as<uint16_t>(grad.scores) + at);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
    // 0 and NaN have no sign, as in torch.sign.
    return {_mm512_movepi16_mask(bits),
            _mm512_mask_cmpge_epu16_mask(inside, _mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)), infinity), bits};
  } else if constexpr (kSign == Sign::kFloat) {
    const uint32_t* scores = as<uint32_t>(grad.scores) + at;
    Signs signs = {0, 0, _mm512_setzero_si512()};
    for (int half = 0; half < 2; ++half) {
      const __mmask16 part = half_of(inside, half);
      const __m512i bits = _mm512_maskz_loadu_epi32(part, scores + 16 * half);
      const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
      const __mmask16 none = _mm512_mask_cmpge_epu32_mask(part, _mm512_sub_epi32(magnitude, _mm512_set1_epi32(1)),
                                                          _mm512_set1_epi32(0x7f800000));
      signs.negative |= static_cast<__mmask32>(_mm512_movepi32_mask(bits)) << (16 * half);
      signs.none |= static_cast<__mmask32>(none) << (16 * half);
    }
    signs.halves = _mm512_movm_epi16(signs.negative);
    return signs;
  } else {
    return {0, 0, _mm512_setzero_si512()};
  }
}

inline __m512 flipped(__m512 value, __mmask16 negative) {
  const __m512i bits = _mm512_castps_si512(value);
  return _mm512_castsi512_ps(
      _mm512_mask_xor_epi32(bits, negative, bits, _mm512_set1_epi32(static_cast<int>(0x80000000))));
}

// Widens columns 0 .. 15 and 16 .. 31 from 16 bits to fp32.
template <Format kFormat>
inline void widen_columns(__m512i halves, __m512 (&wide)[2]) {
  if constexpr (kFormat == Format::kBFloat16) {
    alignas(64) static const uint16_t kLow[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                  0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    constexpr __mmask32 kUpper = 0xaaaaaaaau;  // of each pair: a bf16 is the upper half of an fp32
    wide[0] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, low, halves));
    wide[1] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, high, halves));
  } else {
    wide[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    wide[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  }
}

// Loads weight * sign of 32 columns. The caller handles columns without a sign.
template <Format kFormat, Sign kSign>
inline void load_factors(const void* weight, int64_t at, __mmask32 inside, const Signs& signs, __m512 (&factor)[2]) {
  if constexpr (kFormat == Format::kFloat32) {
    for (int half = 0; half < 2; ++half) {
      const __m512 value = _mm512_maskz_loadu_ps(half_of(inside, half), as<float>(weight) + at + 16 * half);
      factor[half] = flipped(value, half_of(signs.negative, half));
    }
  } else {
    __m512i halves = _mm512_maskz_loadu_epi16(inside, as<uint16_t>(weight) + at);
    constexpr int kXorOfAnd = 0x78;
    if constexpr (kSign != Sign::kNone) {
      halves = _mm512_ternarylogic_epi32(halves, signs.halves, _mm512_set1_epi16(static_cast<short>(0x8000)), kXorOfAnd);
    }
    widen_columns<kFormat>(halves, factor);
  }
}

template <Format kOut>
inline __m512i narrow_columns(const __m512 (&value)[2]) {
#if defined(__AVX512BF16__)
  if constexpr (kOut == Format::kBFloat16) return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value[1], value[0]));
#endif
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_to<kOut>(value[0])), narrow_to<kOut>(value[1]), 1);
}

template <Format kOut>
inline void store_columns(void* base, int64_t at, const __m512 (&result)[2], __mmask32 inside, bool stream) {
  if constexpr (kOut == Format::kFloat32) {
    float* out = static_cast<float*>(base) + at;
    if (stream) {
      _mm512_stream_ps(out, result[0]);
      _mm512_stream_ps(out + 16, result[1]);
    } else {
      _mm512_mask_storeu_ps(out, half_of(inside, 0), result[0]);
      _mm512_mask_storeu_ps(out + 16, half_of(inside, 1), result[1]);
    }
  } else {
    uint16_t* out = static_cast<uint16_t*>(base) + at;
    const __m512i halves = narrow_columns<kOut>(result);
    if (stream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), halves);
    } else {
      _mm512_mask_storeu_epi16(out, inside, halves);
    }
  }
}

template <Format kFormat, Sign kSign, Format kOut, bool kAccumulate>
void store_score_grad_tile(const ScoreGrad& grad, const float* tile, int64_t row, int64_t rows, int64_t column) {
  const __mmask32 inside = first32(grad.columns - column);
  const bool stream = grad.stream && inside == 0xffffffffu;
  for (int64_t r = 0; r < rows; ++r, tile += kTileColumns) {
    const int64_t at = (row + r) * grad.columns + column;
    const Signs signs = signs_at<kSign>(grad, row + r, column, inside);
    __m512 result[2] = {_mm512_loadu_ps(tile), _mm512_loadu_ps(tile + 16)};
    if (grad.weight != nullptr) {
      __m512 factor[2];
      load_factors<kFormat, kSign>(grad.weight, at, inside, signs, factor);
      for (int half = 0; half < 2; ++half) result[half] = _mm512_mul_ps(result[half], factor[half]);
    } else {
      for (int half = 0; half < 2; ++half) result[half] = flipped(result[half], half_of(signs.negative, half));
    }
    if (signs.none != 0) {
      for (int half = 0; half < 2; ++half) {
        result[half] = _mm512_mask_mul_ps(result[half], half_of(signs.none, half), result[half], _mm512_setzero_ps());
      }
    }
    for (int half = 0; kAccumulate && half < 2; ++half) {
      result[half] = _mm512_add_ps(result[half], load_as_float<kOut>(grad.out, at + 16 * half, half_of(inside, half)));
    }
    store_columns<kOut>(grad.out, at, result, inside, stream);
  }
}

using StoreScoreGrad = void (*)(const ScoreGrad&, const float*, int64_t, int64_t, int64_t);

#define MFT_OUT(sign, format)                             \
  {                                                       \
    store_score_grad_tile<kFormat, sign, format, false>,  \
        store_score_grad_tile<kFormat, sign, format, true> \
  }
#define MFT_SIGN(sign) \
  { MFT_OUT(sign, Format::kFloat32), MFT_OUT(sign, Format::kBFloat16), MFT_OUT(sign, Format::kFloat16) }
template <Format kFormat>
const StoreScoreGrad kStoreScoreGrad[4][3][2] = {MFT_SIGN(Sign::kNone), MFT_SIGN(Sign::kWords), MFT_SIGN(Sign::kHalf),
                                                 MFT_SIGN(Sign::kFloat)};
#undef MFT_SIGN
#undef MFT_OUT

template <Format kFormat>
void store_score_grad(const ScoreGrad& grad, const float* tile, int64_t row, int64_t rows, int64_t column) {
  const Sign sign = grad.words != nullptr                   ? Sign::kWords
                    : grad.scores == nullptr                ? Sign::kNone
                    : grad.score_format == Format::kFloat32 ? Sign::kFloat
                                                            : Sign::kHalf;
  const auto format = static_cast<int>(grad.out_format);
  kStoreScoreGrad<kFormat>[static_cast<int>(sign)][format][grad.accumulate](grad, tile, row, rows, column);
}

template <int kWrite>
inline void prefetch_bytes(const void* base, Format format, int64_t at, int64_t columns) {
  const char* from = static_cast<const char*>(base) + at * bytes_of(format);
  for (int64_t b = 0; b < columns * bytes_of(format); b += 64) __builtin_prefetch(from + b, kWrite);
}

template <Format kFormat>
void prefetch_score_grad(const ScoreGrad& grad, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const int64_t count = columns < grad.columns - column ? columns : grad.columns - column;
  for (int64_t r = row; r < row + rows; ++r) {
    const int64_t at = r * grad.columns + column;
    if (grad.weight != nullptr) prefetch_bytes<0>(grad.weight, kFormat, at, count);
    if (grad.scores != nullptr) prefetch_bytes<0>(grad.scores, grad.score_format, at, count);
    if (grad.accumulate) prefetch_bytes<1>(grad.out, grad.out_format, at, count);
  }
}

void finish_streams() { _mm_sfence(); }
