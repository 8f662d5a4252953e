// The decoders of decode.h. One source file per instruction set defines MFT_DECODE and includes this file. Only raw
// pointers here, as in row_kernels.inl.
//
// For each block of a table, the sixteen values are computed and rounded first. Its codes then look them up, 32 at a
// time.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "decode.h"

namespace mft {
namespace {

#include "formats.inl"

constexpr int64_t kUnit = 32;  // codes, in 16 bytes

inline uint32_t rounded(float value, uint32_t, Format) { return as_bits(value); }
inline uint16_t rounded(float value, uint16_t, Format format) {
  return format == Format::kBFloat16 ? to_bfloat16(value) : to_float16(value);
}

template <typename Element>
inline void make_values(Element* values, const float* levels, float absmax, Format format) {
  for (int i = 0; i < kLevels; ++i) values[i] = rounded(levels[i] * absmax, Element{}, format);
}

#if defined(__AVX512BW__)

using Table = __m512i;  // the sixteen values; those of 16 bits twice

// Rounds fp32 to 16 bits. With AVX512-BF16 the result equals to_bfloat16() for normal numbers and 0.
inline __m256i rounded_vector(__m512 v, Format format) {
  if (format == Format::kFloat16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), tie);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}

// Whether rounded_vector() rounds the products of absmax with levels and codes as rounded() does.
inline bool is_usual(float absmax) { return absmax > 1e-30f && absmax < 1e30f; }

inline Table table_of(const uint16_t* values) {
  return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(values)));
}
inline Table table_of(const uint32_t* values) { return _mm512_load_si512(values); }

inline Table table_of(__m512 levels, float absmax, Format format, uint16_t) {
  return _mm512_broadcast_i64x4(rounded_vector(_mm512_mul_ps(levels, _mm512_set1_ps(absmax)), format));
}
inline Table table_of(__m512 levels, float absmax, Format, uint32_t) {
  return _mm512_castps_si512(_mm512_mul_ps(levels, _mm512_set1_ps(absmax)));
}

// Indices that turn each of 16 bytes into two equal 16-bit words.
alignas(64) constexpr uint16_t kEachTwice[] = {
    0x8000, 0x8000, 0x8001, 0x8001, 0x8002, 0x8002, 0x8003, 0x8003, 0x8004, 0x8004, 0x8005,
    0x8005, 0x8006, 0x8006, 0x8007, 0x8007, 0x8008, 0x8008, 0x8009, 0x8009, 0x800a, 0x800a,
    0x800b, 0x800b, 0x800c, 0x800c, 0x800d, 0x800d, 0x800e, 0x800e, 0x800f, 0x800f};

// The code of an even column is in the high bits of its byte.
inline void look_up(uint16_t* out, const uint8_t* codes, Table table) {
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i words = _mm512_shuffle_epi8(bytes, _mm512_load_si512(kEachTwice));
  // Five bits choose one of 32 entries. The table is stored twice, so the fifth bit does not matter.
  const __m512i which = _mm512_srlv_epi16(words, _mm512_set1_epi32(4));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(which, table));
}

inline void look_up(uint32_t* out, const uint8_t* codes, Table table) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m128i even = _mm_srli_epi16(bytes, 4);  // four bits choose: the bits above them do not matter
  const __m512i low = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, bytes));
  const __m512i high = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, bytes));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi32(low, table));
  _mm512_storeu_si512(out + 16, _mm512_permutexvar_epi32(high, table));
}

// Decodes whole blocks from `block` on that end at `end` or before, up to the first whose absmax is not usual. Returns
// how many it decoded. kSize: see decode_table().
template <int64_t kSize, typename Element>
int64_t decode_blocks(Element* out, Format format, const Quantized& weight, int64_t block, int64_t end) {
  const int64_t size = kSize != 0 ? kSize : weight.block;
  if (size % kUnit != 0) return 0;
  const auto* codes = static_cast<const uint8_t*>(weight.codes) + block * size / 2;
  const __m512 levels = _mm512_load_ps(weight.levels);
  const int64_t first = block, last = end / size;
  for (; block < last; ++block) {
    const float absmax = weight.absmax_of(block);
    if (!is_usual(absmax)) break;
    const Table table = table_of(levels, absmax, format, Element{});
    for (int64_t unit = 0; unit < size; unit += kUnit, out += kUnit, codes += kUnit / 2) look_up(out, codes, table);
  }
  return block - first;
}

// Decodes codes times the scale, 16 at a time. Returns how many it decoded.
inline int64_t decode_codes(uint16_t* out, Format format, const int8_t* codes, float scale, int64_t count) {
  int64_t j = 0;
  const __m512 factor = _mm512_set1_ps(scale);
  for (; is_usual(scale) && j + 16 <= count; j += 16) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + j)));
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(wide), factor);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), rounded_vector(value, format));
  }
  return j;
}

#elif defined(__AVX2__)

// Returns the 32 codes of 16 bytes in order, one per byte.
inline __m256i codes_in_order(const uint8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m128i low_bits = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits), odd = _mm_and_si128(bytes, low_bits);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

// The low and the high bytes of the sixteen values, each twice.
struct BytesOfValues {
  __m256i low, high;
};

inline BytesOfValues table_of(const uint16_t* values) {
  const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(values));
  const __m256i low = _mm256_and_si256(all, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(all, 8);
  // packus works within 128-bit lanes; 0xd8 puts the low bytes of all values first, then the high bytes.
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
  return {_mm256_permute2x128_si256(bytes, bytes, 0x00), _mm256_permute2x128_si256(bytes, bytes, 0x11)};
}
inline const uint32_t* table_of(const uint32_t* values) { return values; }

inline void look_up(uint16_t* out, const uint8_t* codes, const BytesOfValues& values) {
  const __m256i which = codes_in_order(codes);
  const __m256i low = _mm256_shuffle_epi8(values.low, which), high = _mm256_shuffle_epi8(values.high, which);
  const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
  auto* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
  _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
}

inline void look_up(uint32_t* out, const uint8_t* codes, const uint32_t* values) {
  alignas(32) uint8_t which[kUnit];
  _mm256_store_si256(reinterpret_cast<__m256i*>(which), codes_in_order(codes));
  const __m256 low = _mm256_loadu_ps(reinterpret_cast<const float*>(values));
  const __m256 high = _mm256_loadu_ps(reinterpret_cast<const float*>(values + 8));
  for (int64_t j = 0; j < kUnit; j += 8) {
    const __m256i eight = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(which + j)));
    const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(eight, 28));  // bit 3 as the sign
    const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, eight), _mm256_permutevar8x32_ps(high, eight),
                                          is_high);
    _mm256_storeu_ps(reinterpret_cast<float*>(out + j), value);
  }
}

#else

template <typename Element>
const Element* table_of(const Element* values) {
  return values;
}

template <typename Element>
inline void look_up(Element* out, const uint8_t* codes, const Element* values) {
  for (int64_t j = 0; j < kUnit; j += 2) {
    out[j] = values[codes[j / 2] >> 4];
    out[j + 1] = values[codes[j / 2] & 15];
  }
}

#endif

#if !defined(__AVX512BW__)

template <int64_t kSize, typename Element>
int64_t decode_blocks(Element*, Format, const Quantized&, int64_t, int64_t) {
  return 0;
}

inline int64_t decode_codes(uint16_t*, Format, const int8_t*, float, int64_t) { return 0; }

#endif

// kSize: the size of a block if the compiler knows it; 0: weight.block.
template <int64_t kSize, typename Element>
void decode_table(Element* out, Format format, const Quantized& weight, int64_t first, int64_t count) {
  const auto* codes = static_cast<const uint8_t*>(weight.codes);
  const int64_t size = kSize != 0 ? kSize : weight.block, end = first + count;
  for (int64_t i = first, block = first / size; i < end; ++block) {
    if (i == block * size) {
      const int64_t whole = decode_blocks<kSize>(out + (i - first), format, weight, block, end);
      i += whole * size, block += whole;
      if (i == end) return;
    }
    const int64_t block_end = (block + 1) * size < end ? (block + 1) * size : end;
    alignas(64) Element values[kLevels];
    make_values(values, weight.levels, weight.absmax_of(block), format);
    const auto table = table_of(values);
    while (i < block_end) {
      if (i % kUnit == 0 && i + kUnit <= block_end) {
        look_up(out + (i - first), codes + i / 2, table);
        i += kUnit;
      } else {
        out[i - first] = values[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
        ++i;
      }
    }
  }
}

void decode_int8(uint32_t* out, Format, const int8_t* codes, float scale, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] = as_bits(codes[j] * scale);
}

void decode_int8(uint16_t* out, Format format, const int8_t* codes, float scale, int64_t count) {
  int64_t j = decode_codes(out, format, codes, scale, count);
  if (format == Format::kBFloat16) {
    for (; j < count; ++j) out[j] = to_bfloat16(codes[j] * scale);
  } else {
    for (; j < count; ++j) out[j] = to_float16(codes[j] * scale);
  }
}

template <typename Element>
void decode_typed(Element* out, Format format, const Quantized& weight, int64_t row, int64_t first, int64_t count) {
  const int64_t index = row * weight.columns + first;
  if (weight.block == 64) {
    decode_table<64>(out, format, weight, index, count);
  } else if (weight.block != 0) {
    decode_table<0>(out, format, weight, index, count);
  } else {
    decode_int8(out, format, static_cast<const int8_t*>(weight.codes) + index, weight.absmax[row] / 127, count);
  }
}

}  // namespace

void MFT_DECODE(void* out, Format format, const Quantized& weight, int64_t row, int64_t first, int64_t count) {
  if (format == Format::kFloat32) {
    decode_typed(static_cast<uint32_t*>(out), format, weight, row, first, count);
  } else {
    decode_typed(static_cast<uint16_t*>(out), format, weight, row, first, count);
  }
}

}  // namespace mft
