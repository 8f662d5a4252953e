// The row kernels. One source file per instruction set defines MFT_ROW_KERNELS and includes this file.
//
// Only raw pointers here: an inline function shared with other files could be linked from the wrong instruction set.

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "row_kernels.h"

namespace mft {
namespace {

#include "keep_bits.inl"
#include "formats.inl"

// ------------------------------------------------------------------------------------------------ masks

template <typename Weight>
inline void select_columns(Weight* out, const Weight* weight, uint32_t bits, int64_t n) {
  if (n == kStep) {
    select(out, weight, bits);
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = (bits >> j) & 1 ? weight[j] : Weight{0};
  }
}

#if defined(__AVX2__)

template <typename Weight>
void mask_by_scores(Weight* out, const Weight* weight, MaskRow mask, Format score_format, int64_t columns) {
  visit_words(mask.scores, score_format, mask.range, columns, [=](int64_t j, int64_t n, uint32_t bits) {
    select_columns(out + j, weight + j, bits, n);
  });
}

#else

// A plain loop, which compilers vectorise. If no instruction turns comparisons into bits, masking by words took 4 to 18
// times as long (SSE2 on Sapphire Rapids, gcc 12 and clang 22).
template <bool kMagnitude, typename Weight, typename Bits>
void mask_by(Weight* out, const Weight* weight, const Bits* scores, KeepRange range, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) {
    out[j] = weight[j] & static_cast<Weight>(-static_cast<Weight>(keeps<kMagnitude>(scores[j], range)));
  }
}

template <typename Weight>
void mask_by_scores(Weight* out, const Weight* weight, MaskRow mask, Format score_format, int64_t columns) {
  const auto by = [=](const auto* scores) {
    mask.range.magnitude ? mask_by<true>(out, weight, scores, mask.range, columns)
                         : mask_by<false>(out, weight, scores, mask.range, columns);
  };
  if (score_format == Format::kFloat32) {
    by(static_cast<const uint32_t*>(mask.scores));
  } else {
    by(static_cast<const uint16_t*>(mask.scores));
  }
}

#endif

template <typename Weight>
void mask_typed(Weight* out, const Weight* weight, MaskRow mask, Format score_format, int64_t columns) {
  if (mask.scores != nullptr) {
    mask_by_scores(out, weight, mask, score_format, columns);
  } else {
    for (int64_t j = 0; j < columns; j += kStep) {
      select_columns(out + j, weight + j, mask.words[j / kStep], columns - j < kStep ? columns - j : kStep);
    }
  }
}

void mask_row(void* out, const void* weight, int weight_bytes, MaskRow mask, Format score_format, int64_t columns) {
  if (weight_bytes == 4) {
    mask_typed(static_cast<uint32_t*>(out), static_cast<const uint32_t*>(weight), mask, score_format, columns);
  } else {
    mask_typed(static_cast<uint16_t*>(out), static_cast<const uint16_t*>(weight), mask, score_format, columns);
  }
}

void pack_row(uint32_t* words, const void* scores, Format score_format, KeepRange range, int64_t columns) {
  visit_words(scores, score_format, range, columns,
              [=](int64_t j, int64_t, uint32_t bits) { words[j / kStep] = bits; });
}

int64_t count_row(const void* scores, Format score_format, KeepRange range, int64_t columns) {
  int64_t total = 0;
  visit_words(scores, score_format, range, columns,
              [&total](int64_t, int64_t, uint32_t bits) { total += __builtin_popcount(bits); });
  return total;
}

// ------------------------------------------------------------------------------------------------ score gradients

constexpr int64_t kBlock = 512;  // three fp32 blocks of 2 KiB stay in L1

inline const char* at(const void* base, Format format, int64_t column) {
  return static_cast<const char*>(base) + column * bytes_of(format);
}

// Word by word, because gcc does not vectorise one long loop (5 times as long). Not unrolled, because clang 14 would
// not vectorise it then.
inline void multiply_by_words(float* product, const uint32_t* words, int64_t n) {
  for (int64_t j = 0; j < n; j += kStep) {
    const uint32_t clear = ~words[j / kStep];
    const int columns = static_cast<int>(n - j < kStep ? n - j : kStep);
#pragma GCC unroll 1
    for (int i = 0; i < columns; ++i) product[j + i] = as_float(as_bits(product[j + i]) ^ (clear >> i << 31));
  }
}

template <typename Bits>
inline void multiply_by_signs(float* product, const Bits* scores, uint32_t infinity, int64_t n) {
  constexpr int kTop = 8 * sizeof(Bits) - 1;
  constexpr uint32_t kMagnitudeBits = (uint32_t{1} << kTop) - 1;
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = scores[j], magnitude = bits & kMagnitudeBits;
    const uint32_t one = magnitude - 1 < infinity ? 0x3f800000u : 0u;  // 0 and NaN have no sign, as in torch.sign
    product[j] *= as_float(one | (bits >> kTop) << 31);
  }
}

void score_grad_row(void* out, Format out_format, const void* grad, Format grad_format, const void* weight,
                    Format weight_format, SignRow sign, Format score_format, bool accumulate, int64_t columns) {
  alignas(64) float product[kBlock], factor[kBlock];
  for (int64_t j = 0; j < columns; j += kBlock) {
    const int64_t n = columns - j < kBlock ? columns - j : kBlock;
    widen(product, at(grad, grad_format, j), grad_format, n);
    if (weight != nullptr) {
      widen(factor, at(weight, weight_format, j), weight_format, n);
      for (int64_t i = 0; i < n; ++i) product[i] *= factor[i];
    }
    if (sign.words != nullptr) {
      multiply_by_words(product, sign.words + j / kStep, n);
    } else if (sign.scores != nullptr && score_format == Format::kFloat32) {
      multiply_by_signs(product, static_cast<const uint32_t*>(sign.scores) + j, 0x7f800000, n);
    } else if (sign.scores != nullptr) {
      const uint32_t infinity = score_format == Format::kBFloat16 ? 0x7f80 : 0x7c00;
      multiply_by_signs(product, static_cast<const uint16_t*>(sign.scores) + j, infinity, n);
    }
    void* here = const_cast<char*>(at(out, out_format, j));
    if (accumulate) {
      widen(factor, here, out_format, n);
      for (int64_t i = 0; i < n; ++i) product[i] += factor[i];
    }
    narrow(here, product, out_format, n);
  }
}

// ------------------------------------------------------------------------------------------------ a window of keys

#if defined(__AVX512BW__)

// 16 scores, as bits that are sign-extended to 32.
inline __m512i load_bits(const uint32_t* scores, __mmask16 inside) { return _mm512_maskz_loadu_epi32(inside, scores); }
inline __m512i load_bits(const uint16_t* scores, __mmask16 inside) {
  return _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(inside, scores));
}

template <bool kMagnitude, typename Bits>
WindowCount window_of(uint32_t* keys, const Bits* scores, const Ranges& ranges, int64_t columns) {
  const __m512i magnitude = _mm512_set1_epi32(static_cast<int>(static_cast<Bits>(~Bits{0}) >> 1));
  const __m512i one = _mm512_set1_epi32(1);
  const auto within = [](__mmask16 read, __m512i place, KeepRange range) {
    return _mm512_mask_cmplt_epu32_mask(read, place, _mm512_set1_epi32(static_cast<int>(range.count)));
  };
  const auto place_in = [](__m512i key, KeepRange range) {
    return _mm512_sub_epi32(key, _mm512_set1_epi32(static_cast<int>(range.low)));
  };
  __m512i below = _mm512_setzero_si512(), above = below;
  int64_t inside = 0;
  for (int64_t j = 0; j < columns; j += 16) {
    const auto read = static_cast<__mmask16>(columns - j < 16 ? (1u << (columns - j)) - 1 : 0xffffu);
    __m512i key = load_bits(scores + j, read);
    if (kMagnitude) {
      key = _mm512_and_si512(key, magnitude);
    } else {
      key = _mm512_xor_si512(key, _mm512_and_si512(_mm512_srai_epi32(key, 31), magnitude));
    }
    below = _mm512_mask_add_epi32(below, within(read, place_in(key, ranges.below), ranges.below), below, one);
    above = _mm512_mask_add_epi32(above, within(read, place_in(key, ranges.above), ranges.above), above, one);
    const __m512i place = place_in(key, ranges.inside);
    const __mmask16 found = within(read, place, ranges.inside);
    _mm512_storeu_si512(keys + inside, _mm512_maskz_compress_epi32(found, place));
    inside += __builtin_popcount(found);
  }
  return {_mm512_reduce_add_epi32(below), inside, _mm512_reduce_add_epi32(above)};
}

#else

// The bits of a key; the upper half of a 16-bit key is its sign.
template <bool kMagnitude, typename Bits>
inline uint32_t key_of(Bits bits) {
  using Signed = std::make_signed_t<Bits>;
  constexpr int32_t kMagnitudeBits = static_cast<Bits>(~Bits{0}) >> 1;
  const int32_t value = static_cast<Signed>(bits);
  return static_cast<uint32_t>(kMagnitude || value >= 0 ? value & kMagnitudeBits : value ^ kMagnitudeBits);
}

template <bool kMagnitude, typename Bits>
WindowCount window_of(uint32_t* keys, const Bits* scores, const Ranges& ranges, int64_t columns) {
  WindowCount count{};
  visit_words<kMagnitude>(scores, ranges.below, columns,
                          [&](int64_t, int64_t, uint32_t word) { count.below += __builtin_popcount(word); });
  visit_words<kMagnitude>(scores, ranges.above, columns,
                          [&](int64_t, int64_t, uint32_t word) { count.above += __builtin_popcount(word); });
  visit_words<kMagnitude>(scores, ranges.inside, columns, [&](int64_t j, int64_t, uint32_t word) {
    for (; word != 0; word &= word - 1) {
      keys[count.inside++] = key_of<kMagnitude>(scores[j + __builtin_ctz(word)]) - ranges.inside.low;
    }
  });
  return count;
}

#endif

WindowCount window_row(uint32_t* keys, const void* scores, Format format, const Ranges& ranges, int64_t columns) {
  const auto of = [&](const auto* s) {
    return ranges.inside.magnitude ? window_of<true>(keys, s, ranges, columns)
                                   : window_of<false>(keys, s, ranges, columns);
  };
  return format == Format::kFloat32 ? of(static_cast<const uint32_t*>(scores))
                                    : of(static_cast<const uint16_t*>(scores));
}

}  // namespace

const RowKernels& MFT_ROW_KERNELS() {
  static const RowKernels table = {mask_row, score_grad_row, pack_row, count_row, window_row};
  return table;
}

}  // namespace mft
