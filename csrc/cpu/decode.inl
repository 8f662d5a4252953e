// decode.h, once: included by one source file per instruction set, which names MFT_DECODE and its flags. Only raw pointers
// here, as in row_kernels.inl.
//
// Of each block of NF4 the sixteen values are made and rounded first; its codes then look them up, 32 at a time.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "decode.h"

namespace mft {
namespace {

#include "formats.inl"

constexpr int kLevels = 16;
constexpr int64_t kUnit = 32;  // codes, in 16 bytes

// arXiv 2305.14314, as bitsandbytes writes them
alignas(64) constexpr float kNf4[kLevels] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

inline uint32_t rounded(float value, uint32_t, Format) { return as_bits(value); }
inline uint16_t rounded(float value, uint16_t, Format format) {
  return format == Format::kBFloat16 ? to_bfloat16(value) : to_float16(value);
}

template <typename Element>
inline void make_values(Element* values, float absmax, Format format) {
  for (int i = 0; i < kLevels; ++i) values[i] = rounded(kNf4[i] * absmax, Element{}, format);
}

#if defined(__AVX512BW__)

// Bytes as they come: the code of an even column is in the high bits.
inline void look_up(uint16_t* out, const uint8_t* codes, const uint16_t* values) {
  const __m512i table = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(values)));
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  // Five bits choose one of 32, and the table is there twice: the fifth does not matter.
  const __m512i which = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(which, table));
}

inline void look_up(uint32_t* out, const uint8_t* codes, const uint32_t* values) {
  const __m512i table = _mm512_load_si512(values);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m128i even = _mm_srli_epi16(bytes, 4);  // four bits choose: what is above them does not matter
  const __m512i low = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, bytes));
  const __m512i high = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, bytes));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi32(low, table));
  _mm512_storeu_si512(out + 16, _mm512_permutexvar_epi32(high, table));
}

#elif defined(__AVX2__)

// The 32 codes of 16 bytes in order, one a byte.
inline __m256i codes_in_order(const uint8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m128i low_bits = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits), odd = _mm_and_si128(bytes, low_bits);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

// Byte `shift / 8` of each value, twice.
template <typename Element>
inline __m256i bytes_of_values(const Element* values, int shift) {
  alignas(16) uint8_t bytes[kLevels];
  for (int i = 0; i < kLevels; ++i) bytes[i] = static_cast<uint8_t>(values[i] >> shift);
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

inline void look_up(uint16_t* out, const uint8_t* codes, const uint16_t* values) {
  const __m256i which = codes_in_order(codes);
  const __m256i low = _mm256_shuffle_epi8(bytes_of_values(values, 0), which);
  const __m256i high = _mm256_shuffle_epi8(bytes_of_values(values, 8), which);
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
inline void look_up(Element* out, const uint8_t* codes, const Element* values) {
  for (int64_t j = 0; j < kUnit; j += 2) {
    out[j] = values[codes[j / 2] >> 4];
    out[j + 1] = values[codes[j / 2] & 15];
  }
}

#endif

template <typename Element>
void decode_nf4(Element* out, Format format, const Quantized& weight, int64_t first, int64_t count) {
  const auto* codes = static_cast<const uint8_t*>(weight.codes);
  const int64_t end = first + count;
  for (int64_t i = first; i < end;) {
    const int64_t block = i / kNf4Block, block_end = (block + 1) * kNf4Block < end ? (block + 1) * kNf4Block : end;
    alignas(64) Element values[kLevels];
    make_values(values, weight.absmax_of(block), format);
    while (i < block_end) {
      if (i % kUnit == 0 && i + kUnit <= block_end) {
        look_up(out + (i - first), codes + i / 2, values);
        i += kUnit;
      } else {
        out[i - first] = values[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
        ++i;
      }
    }
  }
}

template <typename Element>
void decode_int8(Element* out, Format format, const int8_t* codes, float scale, int64_t count) {
  if (format == Format::kBFloat16) {
    for (int64_t j = 0; j < count; ++j) out[j] = rounded(codes[j] * scale, Element{}, Format::kBFloat16);
  } else {
    for (int64_t j = 0; j < count; ++j) out[j] = rounded(codes[j] * scale, Element{}, Format::kFloat16);
  }
}

template <typename Element>
void decode_typed(Element* out, Format format, const Quantized& weight, int64_t row, int64_t first, int64_t count) {
  const int64_t index = row * weight.columns + first;
  if (weight.nf4) {
    decode_nf4(out, format, weight, index, count);
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
