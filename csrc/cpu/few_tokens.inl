// The kernels of few_tokens.h. One source file per instruction set defines MFT_FEW_KERNELS and includes this file. Only
// raw pointers here, as in row_kernels.inl.
//
// 32 columns of a row and their word of the mask are processed in units of two fp32 vectors (first, second). A unit of
// bf16 is widened by a shift and a mask, so that `first` has its even columns and `second` its odd ones. The tokens of
// dot() have the same layout; sum() puts its sums in order at the end. With AVX512-BF16, dot() takes a vector of bf16
// as it is, and sum() interleaves two rows so that vdpbf16ps adds both at once.

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "few_tokens.h"

namespace mft {
namespace {

#include "keep_bits.inl"
#include "formats.inl"

#define MFT_UNROLL _Pragma("GCC unroll 16")
#define MFT_INLINE inline __attribute__((always_inline))  // so that the sums stay in registers

// ------------------------------------------------------------------------------------------------ vectors

#if defined(__AVX512BW__)

using Floats = __m512;
constexpr int kLanes = 16;
constexpr int kManyRows = 4;
constexpr int kDotTokens = 6;   // with 4 rows: 24 of 32 registers
constexpr int kSumTokens = 12;  // with 2 vectors each: 24 of 32 registers
constexpr bool kFloat16Alternates = false;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }

struct Two {
  Floats first, second;
};

inline Two kept_float32(const uint32_t* weight, uint32_t bits) {
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(bits), weight)),
          _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(bits >> 16), weight + 16))};
}

inline Two kept_bfloat16(const uint16_t* weight, uint32_t bits) {
  const __m512i both = _mm512_maskz_loadu_epi16(bits, weight);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

inline Two kept_float16(const uint16_t* weight, uint32_t bits) {
  const auto* halves = reinterpret_cast<const __m256i*>(weight);
  return {_mm512_maskz_cvtph_ps(static_cast<__mmask16>(bits), _mm256_loadu_si256(halves)),
          _mm512_maskz_cvtph_ps(static_cast<__mmask16>(bits >> 16), _mm256_loadu_si256(halves + 1))};
}

inline Two interleaved(Two v) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(v.first, low, v.second), _mm512_permutex2var_ps(v.first, high, v.second)};
}

// out[i] = the sum of the lanes of v[i], in the same order for each i.
inline void add_across(float out[4], const Floats v[4]) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  }
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

#elif defined(__AVX2__)

using Floats = __m256;
constexpr int kLanes = 8;
constexpr int kManyRows = 2;
constexpr int kDotTokens = 6;  // with 2 rows: 12 of 16 registers; a mask is costly here, and all tokens share it
constexpr int kSumTokens = 6;  // with 2 vectors each: 12 of 16 registers
constexpr bool kFloat16Alternates = false;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats broadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }

struct Two {
  Floats first, second;
};

// Sets all bits of lane i if `bits` has the bit one_bit[i].
inline __m256i lanes_of(uint32_t bits, __m256i one_bit) {
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), one_bit), one_bit);
}

inline Two kept_float32(const uint32_t* weight, uint32_t bits) {
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8);
  return {_mm256_castsi256_ps(_mm256_and_si256(lanes_of(bits, low), load(static_cast<const void*>(weight)))),
          _mm256_castsi256_ps(_mm256_and_si256(lanes_of(bits, high), load(static_cast<const void*>(weight + 8))))};
}

inline Two kept_bfloat16(const uint16_t* weight, uint32_t bits) {
  const __m256i one_bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                            static_cast<short>(32768));
  const __m256i word = _mm256_set1_epi16(static_cast<short>(bits));
  const __m256i keep = _mm256_cmpeq_epi16(_mm256_and_si256(word, one_bit), one_bit);
  const __m256i both = _mm256_and_si256(keep, load(static_cast<const void*>(weight)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
}

inline Two kept_float16(const uint16_t* weight, uint32_t bits) {
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8);
  const auto* halves = reinterpret_cast<const __m128i*>(weight);
  return {_mm256_and_ps(_mm256_castsi256_ps(lanes_of(bits, low)), _mm256_cvtph_ps(_mm_loadu_si128(halves))),
          _mm256_and_ps(_mm256_castsi256_ps(lanes_of(bits, high)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1)))};
}

inline Two interleaved(Two v) {
  const __m256 low = _mm256_unpacklo_ps(v.first, v.second), high = _mm256_unpackhi_ps(v.first, v.second);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}

inline void add_across(float out[4], const Floats v[4]) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

#else

// The compiler's vector extensions: SSE2, NEON, or whatever else the machine has.
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kManyRows = 2;
constexpr int kDotTokens = 4;  // with 2 rows: 8 of 16 registers; a product takes one more before it is added
constexpr int kSumTokens = 4;  // with 2 vectors each: 8 of 16 registers
constexpr bool kFloat16Alternates = true;

inline Floats zeros() { return Floats{}; }
inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline Floats broadcast(const float* p) { return Floats{*p, *p, *p, *p}; }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return sum + a * b; }

struct Two {
  Floats first, second;
};

inline Words load_words(const void* p) {
  Words v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats kept_of(Words weight, uint32_t bits, Words one_bit) {
  const Words word = {bits, bits, bits, bits};
  return reinterpret_cast<Floats>(weight & reinterpret_cast<Words>((word & one_bit) == one_bit));
}

inline Two kept_float32(const uint32_t* weight, uint32_t bits) {
  return {kept_of(load_words(weight), bits, Words{1, 2, 4, 8}),
          kept_of(load_words(weight + 4), bits, Words{16, 32, 64, 128})};
}

inline Two kept_bfloat16(const uint16_t* weight, uint32_t bits) {
  const Words both = load_words(weight);  // even columns in the low halves, odd ones in the high halves
  return {kept_of(both << 16, bits, Words{1, 4, 16, 64}), kept_of(both & 0xffff0000u, bits, Words{2, 8, 32, 128})};
}

// Does what from_float16() does; the reasons are there.
inline Words widened(Words half) {
  const Words magnitude = half & 0x7fff;
  const Words small = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude + 0x3f000000u) - 0.5f);
  const Words large = (magnitude << 13) | 0x7f800000u, normal = (magnitude << 13) + 0x38000000u;
  const auto compared = reinterpret_cast<Integers>(magnitude);  // SSE2 compares signed integers only
  const Words is_small = reinterpret_cast<Words>(compared < 0x0400);
  const Words is_large = reinterpret_cast<Words>(compared > 0x7bff);
  const Words value = (is_small & small) | (is_large & large) | (~(is_small | is_large) & normal);
  return value | (half & 0x8000u) << 16;
}

inline Two kept_float16(const uint16_t* weight, uint32_t bits) {
  const Words both = load_words(weight);
  return {kept_of(widened(both & 0xffffu), bits, Words{1, 4, 16, 64}),
          kept_of(widened(both >> 16), bits, Words{2, 8, 32, 128})};
}

inline Two interleaved(Two v) {
  return {Floats{v.first[0], v.second[0], v.first[1], v.second[1]},
          Floats{v.first[2], v.second[2], v.first[3], v.second[3]}};
}

inline void add_across(float out[4], const Floats v[4]) {
  for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
}

#endif

constexpr int kUnit = 2 * kLanes;  // columns

// Prefetches into L2. Weights are prefetched whatever the size of a layer: in a model, even a small weight has
// left the caches when its turn comes. Scores are always prefetched, because they are read row by row. Without this,
// one token of SmolLM2's linears from fp32 scores took 2.6 times a dense product; with it, 2.3 (Xeon with AMX). For the
// weight, see dot_rows().
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------------ kinds of product

// How dot() and sum() treat a format with elements of type E. kept(): a masked unit of the weight. in_order(): a unit of
// sums with its columns in order. kPair: rows that sum() takes at once. kAlternates: `first` has the even columns.
template <Format kOwn, typename E, Two (*kKept)(const E*, uint32_t), bool kEvenFirst>
struct OneRow {
  using Element = E;
  static constexpr Format kFormat = kOwn;
  static constexpr int kPair = 1;
  static constexpr bool kAlternates = kEvenFirst;
  static Two kept(const Element* weight, uint32_t bits) { return kKept(weight, bits); }
  static Two in_order(Two sums) { return kAlternates ? interleaved(sums) : sums; }
};

using Float32 = OneRow<Format::kFloat32, uint32_t, kept_float32, false>;
using BFloat16 = OneRow<Format::kBFloat16, uint16_t, kept_bfloat16, true>;
using Float16 = OneRow<Format::kFloat16, uint16_t, kept_float16, kFloat16Alternates>;

// sums[row][token] += a unit of each row times the same unit of each token.
template <typename Kind, int kRows, int kTokens>
struct Dot {
  MFT_INLINE static void add(Floats sums[kRows][kTokens], const typename Kind::Element* const* weight,
                             const uint32_t* bits, int64_t j, const float* tokens, int64_t stride, int64_t column) {
    MFT_UNROLL
    for (int part = 0; part < 2; ++part) {
      Floats w[kRows];
      MFT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Two both = Kind::kept(weight[r] + column, bits[r] >> j);
        w[r] = part == 0 ? both.first : both.second;
      }
      MFT_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Floats x = load(tokens + t * stride + column + part * kLanes);
        MFT_UNROLL
        for (int r = 0; r < kRows; ++r) sums[r][t] = multiply_add(w[r], x, sums[r][t]);
      }
    }
  }
};

// kept(): a masked unit of one row, or of a pair of rows, for sum(). add(): adds it, times a token, to the token's
// sums.
template <typename Kind>
struct Sum {
  MFT_INLINE static Two kept(const typename Kind::Element* const* weight, const uint32_t* const* words, int64_t word,
                             int j, int64_t column) {
    return Kind::kept(weight[0] + column, words[0][word] >> j);
  }
  MFT_INLINE static void add(Two& sums, Two weight, const float* token) {
    const Floats factor = broadcast(token);
    sums.first = multiply_add(weight.first, factor, sums.first);
    sums.second = multiply_add(weight.second, factor, sums.second);
  }
};

#if defined(__AVX512BF16__)

inline __m512bh as_pairs(__m512i v) { return reinterpret_cast<__m512bh>(v); }

struct PairsOfBFloat16 {
  using Element = uint16_t;
  static constexpr Format kFormat = Format::kBFloat16;
  static constexpr int kPair = 2;
  static constexpr bool kAlternates = false;
  // Columns 0 .. 3 of each 8 went to `first`, 4 .. 7 to `second`.
  static Two in_order(Two sums) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    return {_mm512_permutex2var_ps(sums.first, low, sums.second),
            _mm512_permutex2var_ps(sums.first, high, sums.second)};
  }
};

template <int kRows, int kTokens>
struct Dot<PairsOfBFloat16, kRows, kTokens> {
  MFT_INLINE static void add(Floats sums[kRows][kTokens], const uint16_t* const* weight, const uint32_t* bits, int64_t,
                             const float* tokens, int64_t stride, int64_t column) {
    __m512i w[kRows];
    MFT_UNROLL
    for (int r = 0; r < kRows; ++r) w[r] = _mm512_maskz_loadu_epi16(bits[r], weight[r] + column);
    MFT_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const __m512i x = _mm512_loadu_si512(reinterpret_cast<const uint16_t*>(tokens + t * stride) + column);
      MFT_UNROLL
      for (int r = 0; r < kRows; ++r) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], as_pairs(w[r]), as_pairs(x));
    }
  }
};

template <>
struct Sum<PairsOfBFloat16> {
  MFT_INLINE static Two kept(const uint16_t* const* weight, const uint32_t* const* words, int64_t word, int,
                             int64_t column) {
    const __m512i even = _mm512_maskz_loadu_epi16(words[0][word], weight[0] + column);
    const __m512i odd = _mm512_maskz_loadu_epi16(words[1][word], weight[1] + column);
    return {_mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd)),
            _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd))};
  }
  MFT_INLINE static void add(Two& sums, Two weight, const float* token) {
    const __m512i pair = _mm512_set1_epi32(*reinterpret_cast<const int*>(token));
    sums.first = _mm512_dpbf16_ps(sums.first, as_pairs(_mm512_castps_si512(weight.first)), as_pairs(pair));
    sums.second = _mm512_dpbf16_ps(sums.second, as_pairs(_mm512_castps_si512(weight.second)), as_pairs(pair));
  }
};

using BFloat16Kind = PairsOfBFloat16;
#else
using BFloat16Kind = BFloat16;
#endif

// Calls use(kind) with the kind of a format.
template <typename Use>
inline void with_kind(Format format, Use use) {
  if (format == Format::kFloat32) {
    use(Float32());
  } else if (format == Format::kBFloat16) {
    use(BFloat16Kind());
  } else {
    use(Float16());
  }
}

// ------------------------------------------------------------------------------------------------ tokens

void prepare_sum(float* out, const void* token, Format format, int64_t length) {
  const int64_t padded = (length + kStep - 1) / kStep * kStep;
  if (format == BFloat16Kind::kFormat && BFloat16Kind::kPair == 2) {
    auto* pairs = reinterpret_cast<uint16_t*>(out);
    std::memcpy(pairs, token, length * 2);
    std::memset(pairs + length, 0, (padded - length) * 2);
  } else {
    widen(out, token, format, length);
    std::memset(out + length, 0, (padded - length) * 4);
  }
}

void prepare_dot(float* out, const void* token, Format format, int64_t length) {
  prepare_sum(out, token, format, length);
  bool alternates = false;
  with_kind(format, [&](auto kind) { alternates = decltype(kind)::kAlternates; });
  if (!alternates) return;
  for (int64_t j = 0; j < length; j += kUnit) {
    float even[kLanes], odd[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      even[i] = out[j + 2 * i];
      odd[i] = out[j + 2 * i + 1];
    }
    std::memcpy(out + j, even, sizeof even);
    std::memcpy(out + j + kLanes, odd, sizeof odd);
  }
}

// ------------------------------------------------------------------------------------------------ masks

inline const char* weight_row(const FewTokens& call, int64_t row) {
  return call.weight + row * call.columns * bytes_of(call.format);
}

// Returns `columns` columns of a row from `first` on: in place, or decoded into the i-th part of call.room. Prefetches
// the codes of the row that is `rows` further on into L2.
template <typename Element>
inline const Element* weight_part(const FewTokens& call, int64_t row, int64_t first, int64_t columns, int64_t i,
                                  int64_t rows) {
  if (call.codes == nullptr) return reinterpret_cast<const Element*>(weight_row(call, row)) + first;
  const Span next = codes_span(*call.codes, row + rows, first, columns);
  for (int64_t b = 0; b < next.bytes; b += 64) prefetch(next.from + b);
  Element* out = reinterpret_cast<Element*>(call.room) + i * columns;
  call.decode(out, call.format, *call.codes, row, first, columns);
  return out;
}

// Returns the mask words of `columns` columns of a row from `first` on: in place, or computed from its scores into
// `scratch`. Prefetches what the row that is `rows` further on will need into L2.
inline const uint32_t* words_of(const FewTokens& call, int64_t row, int64_t first, int64_t columns, int64_t rows,
                                uint32_t* scratch) {
  if (call.scores == nullptr) {
    const int64_t stride = call.keeps_all ? 0 : (call.columns + kStep - 1) / kStep;
    const uint32_t* words = call.words + row * stride + first / kStep;
    for (int64_t j = 0; j < columns; j += 16 * kStep) prefetch(words + rows * stride + j / kStep);
    return words;
  }
  const int64_t width = bytes_of(call.score_format), ahead = rows * call.columns * width;
  const char* scores = static_cast<const char*>(call.scores) + (row * call.columns + first) * width;
  visit_words(scores, call.score_format, call.range, columns, [=](int64_t j, int64_t, uint32_t bits) {
    prefetch(scores + j * width + ahead);
    if (width == 4) prefetch(scores + j * width + ahead + 64);
    scratch[j / kStep] = bits;
  });
  return scratch;
}

// ------------------------------------------------------------------------------------------------ dot

// Adds up the lanes of each sum and stores y for these rows and tokens.
template <typename Kind, int kRows, int kTokens>
MFT_INLINE void store_dots(const FewTokens& call, const Floats sums[kRows][kTokens], int64_t first_row, int64_t rows,
                           int64_t apart, int64_t first_token) {
  constexpr int kFours = (kRows + 3) / 4;
  float y[kTokens][4 * kFours];
  MFT_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    MFT_UNROLL
    for (int f = 0; f < kFours; ++f) {
      Floats four[4];
      MFT_UNROLL
      for (int i = 0; i < 4; ++i) four[i] = 4 * f + i < kRows ? sums[4 * f + i < kRows ? 4 * f + i : 0][t] : zeros();
      add_across(y[t] + 4 * f, four);
    }
  }
  const int64_t width = bytes_of(call.format);
  for (int64_t r = 0; r < (rows < kRows ? rows : kRows); ++r) {  // `rows` alone makes gcc warn of reads beyond y
    const int64_t row = first_row + r * apart;
    float bias = 0;
    if (call.bias != nullptr) widen(&bias, call.bias + row * width, call.format, 1);
    for (int t = 0; t < kTokens; ++t) {
      const float sum = call.bias != nullptr ? y[t][r] + bias : y[t][r];  // -0 + 0 would be 0
      const int64_t place = call.places != nullptr ? call.places[first_token + t] : first_token + t;
      narrow(call.out + (place * call.rows + row) * width, &sum, call.format, 1);
    }
  }
}

// Which cache lines a block of tokens prefetches while it works: one in `every`, and each block different ones. With
// several blocks, 16-bit weights prefetch the next rows. So memory is as busy during the last tokens as during the
// first. If the first block prefetched all lines, 8 to 32 tokens took 5 to 10 % longer (bf16, 4096 x 4096, Zen 4).
struct Fetch {
  int64_t ahead = 0;            // bytes; 0: no prefetch
  int64_t every = 1, left = 1;  // steps between two lines, and steps left to the next one

  bool due() {
    if (ahead == 0 || --left > 0) return false;
    left = every;
    return true;
  }
  // Prefetches what lies ahead of kStep elements.
  template <typename Element>
  void bring(const Element* step) const {
    for (int64_t b = 0; b < kStep * static_cast<int64_t>(sizeof(Element)); b += 64) {
      prefetch(reinterpret_cast<const char*>(step) + ahead + b);
    }
  }
};

// Multiplies kRows rows of the weight, `apart` rows from each other, with each of kTokens tokens. Rows from `rows` on
// repeat the last one and are not stored. Without kMasked, the words are all ones and only those of the last columns
// are read.
template <typename Kind, int kRows, bool kMasked, int kTokens>
void dot_block(const FewTokens& call, const typename Kind::Element* const* weight, const uint32_t* const* words,
               int64_t first_row, int64_t rows, int64_t apart, int64_t first_token, Fetch fetch) {
  using Element = typename Kind::Element;
  constexpr int kColumns = Kind::kPair == 2 ? kStep : kUnit;
  const int64_t whole = call.columns / kStep * kStep, left = call.columns - whole;
  const int64_t stride = few_token_stride(call.columns);
  const float* tokens = call.tokens + first_token * stride;

  const Element* from[kRows];
  const uint32_t* masks[kRows];
  for (int r = 0; r < kRows; ++r) {
    from[r] = weight[r];
    masks[r] = words[r];
  }
  Floats sums[kRows][kTokens];
  MFT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MFT_UNROLL
    for (int t = 0; t < kTokens; ++t) sums[r][t] = zeros();
  }
  Element padded[kRows][kStep];
  uint32_t last[kRows];
  int64_t columns = whole;
  for (int pass = 0; pass < (left > 0 ? 2 : 1); ++pass) {
    if (pass == 1) {  // the last columns, padded with zeros
      for (int r = 0; r < kRows; ++r) {
        std::memset(padded[r], 0, sizeof padded[r]);
        std::memcpy(padded[r], from[r] + whole, left * sizeof(Element));
        last[r] = masks[r][whole / kStep] & low_bits(left);
        from[r] = padded[r];
        masks[r] = last + r;
      }
      tokens += Kind::kPair == 2 ? whole / 2 : whole;
      columns = kStep;
      fetch = {};
    }
    for (int64_t j = 0; j < columns; j += kStep) {
      uint32_t bits[kRows];
      MFT_UNROLL
      for (int r = 0; r < kRows; ++r) bits[r] = kMasked ? masks[r][j / kStep] : ~0u;
      if (fetch.due()) {
        MFT_UNROLL
        for (int r = 0; r < kRows; ++r) fetch.bring(from[r] + j);
      }
      MFT_UNROLL
      for (int u = 0; u < kStep; u += kColumns) {
        Dot<Kind, kRows, kTokens>::add(sums, from, bits, u, tokens, stride, j + u);
      }
    }
  }
  store_dots<Kind, kRows, kTokens>(call, sums, first_row, rows, apart, first_token);
}

constexpr int64_t kAhead = 4096;  // bytes of all rows together between a load and its prefetch

template <typename Kind, int kRows, bool kMasked>
void dot_tokens(const FewTokens& call, const typename Kind::Element* const* weight, const uint32_t* const* words,
                int64_t first_row, int64_t rows, int64_t apart, bool fetch = true) {
  constexpr int kMost = kRows > kManyRows ? 1 : kDotTokens;  // more rows: one token, see dot()
  using Block = void (*)(const FewTokens&, const typename Kind::Element* const*, const uint32_t* const*, int64_t,
                         int64_t, int64_t, int64_t, Fetch);
  static constexpr Block kBlocks[] = {
      dot_block<Kind, kRows, kMasked, 1>,
      dot_block<Kind, kRows, kMasked, kMost < 2 ? kMost : 2>,
      dot_block<Kind, kRows, kMasked, kMost < 3 ? kMost : 3>,
      dot_block<Kind, kRows, kMasked, kMost < 4 ? kMost : 4>,
      dot_block<Kind, kRows, kMasked, kMost < 5 ? kMost : 5>,
      dot_block<Kind, kRows, kMasked, kMost < 6 ? kMost : 6>,
  };
  constexpr int64_t kWidth = sizeof(typename Kind::Element);
  const int64_t groups = (call.count + kMost - 1) / kMost;
  const int64_t ahead = !fetch ? 0 : groups > 1 && kWidth < 4 ? call.columns * kWidth : kAhead / kRows;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = call.count * g / groups, end = call.count * (g + 1) / groups;
    kBlocks[end - first - 1](call, weight, words, first_row, rows, apart, first, {ahead, groups, g + 1});
  }
}

// Takes kRows rows at a time, each from its own part of the rows. The processor's prefetchers follow several such
// streams from page to page. They lose a single stream, or neighbouring rows, at the end of each page.
// SmolLM2's linears with cold weights, time relative to a dense product (Xeon with AMX):
//
//                              one row of each part    neighbouring rows
//   fp32, 1 token, 2 threads             1.05                  1.30
//   fp32, 1 token, 1 thread              1.03                  1.22
//   bf16, 1 token, 2 threads             0.56                  0.64
//   bf16, 1 token, 1 thread              0.58                  0.73
//   fp32, 4 tokens                       0.68                  0.86
//   bf16, 4 tokens                       0.56                  0.76
//
// Prefetching kAhead in addition fills L2's line buffers. Time compared with no such prefetch, 4096 x 4096, from DRAM
// (Xeon with AMX, 2 threads): bf16 0.86 for 1 token and 0.85 for 4, fp32 0.96 and 0.90. The next row instead of kAhead
// took 1.04 times as long in bf16, and made fp32 no faster.
template <typename Kind, int kRows, bool kMasked>
void dot_rows(const FewTokens& call, int64_t first_row, int64_t end_row, uint32_t* scratch) {
  using Element = typename Kind::Element;
  const int64_t words_stride = (call.columns + kStep - 1) / kStep, part = (end_row - first_row + kRows - 1) / kRows;
  for (int64_t row = first_row; row < first_row + part; ++row) {
    const int64_t rows = (end_row - row + part - 1) / part;  // kRows, or fewer if the last parts are shorter
    const Element* weight[kRows];
    const uint32_t* words[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t mine = row + r * part;
      const bool exists = r < rows;
      weight[r] = exists ? weight_part<Element>(call, mine, 0, call.columns, r, 1) : weight[rows - 1];
      words[r] = exists ? words_of(call, mine, 0, call.columns, 1, scratch + r * words_stride) : words[rows - 1];
    }
    dot_tokens<Kind, kRows, kMasked>(call, weight, words, row, rows, part, call.codes == nullptr);
  }
}

void dot(const FewTokens& call, int64_t first_row, int64_t end_row, uint32_t* scratch) {
  with_kind(call.format, [&](auto kind) {
    using Kind = decltype(kind);
    const auto rows = [&](auto masked) {
      constexpr int kRows = kDotRows, kMany = kManyRows;
      constexpr bool kMasked = decltype(masked)::value;
      (call.count == 1 ? dot_rows<Kind, kRows, kMasked> : dot_rows<Kind, kMany, kMasked>)(call, first_row, end_row, scratch);
    };
    call.keeps_all ? rows(std::false_type()) : rows(std::true_type());
  });
}

#include "many_masks.inl"

// ------------------------------------------------------------------------------------------------ sum

constexpr int kSumRows = 8;  // even, because PairsOfBFloat16 takes two at once
static_assert(kSumRows <= kDotRows, "what decodes has room for kDotRows");

// sums[token][columns] += token[rows] @ rows, for kTokens tokens and kSumRows rows of a strip.
template <typename Kind, int kTokens>
void sum_block(float* sums, int64_t sums_stride, const typename Kind::Element* const* weight,
               const uint32_t* const* words, const float* tokens, int64_t token_stride, int64_t columns,
               int64_t ahead) {
  using Element = typename Kind::Element;
  constexpr int kColumns = Kind::kPair == 2 ? kStep : kUnit;
  constexpr int kPairs = kSumRows / Kind::kPair;
  float factors[kPairs][kTokens];
  for (int t = 0; t < kTokens; ++t) {
    for (int p = 0; p < kPairs; ++p) std::memcpy(&factors[p][t], tokens + t * token_stride + p, sizeof(float));
  }
  const Element* from[kSumRows];
  const uint32_t* masks[kSumRows];
  for (int r = 0; r < kSumRows; ++r) {
    from[r] = weight[r];
    masks[r] = words[r];
  }
  for (int64_t j = 0; j < columns; j += kStep) {
    if (ahead != 0) {
      MFT_UNROLL
      for (int r = 0; r < kSumRows; ++r) {
        const char* next = reinterpret_cast<const char*>(from[r] + j) + ahead;
        prefetch(next);
        if (sizeof(Element) == 4) prefetch(next + 64);
      }
    }
    for (int u = 0; u < kStep; u += kColumns) {
      Two sum[kTokens];
      MFT_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const float* here = sums + t * sums_stride + j + u;
        sum[t] = {load(here), load(here + kLanes)};
      }
      const auto add_rows = [&](int p) {
        const int r = p * Kind::kPair;
        const Two w = Sum<Kind>::kept(from + r, masks + r, j / kStep, u, j + u);
        MFT_UNROLL
        for (int t = 0; t < kTokens; ++t) Sum<Kind>::add(sum[t], w, &factors[p][t]);
      };
      if constexpr (kTokens <= 4) {
        MFT_UNROLL
        for (int p = 0; p < kPairs; ++p) add_rows(p);
      } else {
        for (int p = 0; p < kPairs; ++p) add_rows(p);
      }
      MFT_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        float* here = sums + t * sums_stride + j + u;
        store(here, sum[t].first);
        store(here + kLanes, sum[t].second);
      }
    }
  }
}

template <typename Kind>
void sum_tokens(float* sums, int64_t sums_stride, const typename Kind::Element* const* weight,
                const uint32_t* const* words, const float* tokens, int64_t token_stride, int64_t count, int64_t columns,
                int64_t ahead) {
  using Block = void (*)(float*, int64_t, const typename Kind::Element* const*, const uint32_t* const*, const float*,
                         int64_t, int64_t, int64_t);
#define MFT_SUM_BLOCK(n) sum_block<Kind, (kSumTokens < n ? kSumTokens : n)>
  static constexpr Block kBlocks[] = {
      MFT_SUM_BLOCK(1), MFT_SUM_BLOCK(2), MFT_SUM_BLOCK(3), MFT_SUM_BLOCK(4),  MFT_SUM_BLOCK(5),  MFT_SUM_BLOCK(6),
      MFT_SUM_BLOCK(7), MFT_SUM_BLOCK(8), MFT_SUM_BLOCK(9), MFT_SUM_BLOCK(10), MFT_SUM_BLOCK(11), MFT_SUM_BLOCK(12)};
#undef MFT_SUM_BLOCK
  const int64_t groups = (count + kSumTokens - 1) / kSumTokens;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = count * g / groups, end = count * (g + 1) / groups;
    kBlocks[end - first - 1](sums + first * sums_stride, sums_stride, weight, words, tokens + first * token_stride,
                             token_stride, columns, g == 0 ? ahead : 0);
  }
}

template <typename Kind>
void store_sums(char* out, const float* sums, const char* bias, int64_t columns) {
  alignas(64) float block[8 * kStep], added[8 * kStep];
  for (int64_t j = 0; j < columns; j += 8 * kStep) {
    const int64_t n = smaller(8 * kStep, columns - j);
    for (int64_t u = 0; u < n; u += kUnit) {
      const Two ordered = Kind::in_order({load(sums + j + u), load(sums + j + u + kLanes)});
      store(block + u, ordered.first);
      store(block + u + kLanes, ordered.second);
    }
    if (bias != nullptr) {
      widen(added, bias + j * bytes_of(Kind::kFormat), Kind::kFormat, n);
      for (int64_t i = 0; i < n; ++i) block[i] += added[i];
    }
    narrow(out + j * bytes_of(Kind::kFormat), block, Kind::kFormat, n);
  }
}

template <typename Kind>
void sum_strip(const FewTokens& call, int64_t first, int64_t columns, int64_t sums_stride, float* sums) {
  using Element = typename Kind::Element;
  constexpr int kWords = kStripColumns / kStep;
  const int64_t stride = few_token_stride(call.rows), whole = columns / kStep * kStep, left = columns - whole;
  const int64_t used = (columns + kStep - 1) / kStep * kStep;
  for (int64_t t = 0; t < call.count; ++t) std::memset(sums + t * sums_stride, 0, used * sizeof(float));
  uint32_t scratch[kSumRows][kWords];
  static const uint32_t kNone[kWords] = {};
  for (int64_t row = 0; row < call.rows; row += kSumRows) {
    const int64_t rows = smaller(kSumRows, call.rows - row);
    const Element* weight[kSumRows];
    const uint32_t* words[kSumRows];
    for (int64_t r = 0; r < kSumRows; ++r) {
      const bool exists = r < rows;  // if not, its mask is empty and it adds 0
      weight[r] = exists ? weight_part<Element>(call, row + r, first, columns, r, kSumRows) : weight[rows - 1];
      words[r] = exists ? words_of(call, row + r, first, columns, kSumRows, scratch[r]) : kNone;
    }
    const float* tokens = call.tokens + row / Kind::kPair;
    sum_tokens<Kind>(sums, sums_stride, weight, words, tokens, stride, call.count, whole,
                     call.codes == nullptr ? kSumRows * call.columns * static_cast<int64_t>(sizeof(Element)) : 0);
    if (left == 0) continue;
    Element padded[kSumRows][kStep] = {};
    const Element* tails[kSumRows];
    uint32_t bits[kSumRows];
    const uint32_t* last[kSumRows];
    for (int64_t r = 0; r < kSumRows; ++r) {
      if (r < rows) std::memcpy(padded[r], weight[r] + whole, left * sizeof(Element));
      tails[r] = padded[r];
      bits[r] = words[r][whole / kStep] & low_bits(left);
      last[r] = bits + r;
    }
    sum_tokens<Kind>(sums + whole, sums_stride, tails, last, tokens, stride, call.count, kStep, 0);
  }
  const int64_t width = bytes_of(call.format);
  const char* bias = call.bias != nullptr ? call.bias + first * width : nullptr;
  for (int64_t t = 0; t < call.count; ++t) {
    store_sums<Kind>(call.out + (t * call.columns + first) * width, sums + t * sums_stride, bias, columns);
  }
}

void sum(const FewTokens& call, int64_t first_column, int64_t end_column, float* scratch) {
  const int64_t strip = few_strip_columns(call.format, call.count);
  with_kind(call.format, [&](auto kind) {
    for (int64_t c = first_column; c < end_column; c += strip) {
      sum_strip<decltype(kind)>(call, c, smaller(strip, end_column - c), strip + 16, scratch);
    }
  });
}

}  // namespace

const FewKernels& MFT_FEW_KERNELS() {
  static const FewKernels table = {prepare_dot, prepare_sum, dot, dot_many, sum};
  return table;
}

}  // namespace mft
