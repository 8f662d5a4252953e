// 32 columns at a time, per instruction set: keep_bits() computes a word of the packed mask from scores, select()
// applies it to a weight.
//
// Included into an anonymous namespace of namespace mft, after row_kernels.h, <cstring> and <immintrin.h>.

constexpr int kStep = 32;

#if defined(__AVX512BW__)

template <bool kMagnitude>
inline uint32_t keep_bits(const uint16_t* scores, KeepRange range) {
  const __m512i low = _mm512_set1_epi16(static_cast<short>(range.low));
  const __m512i count = _mm512_set1_epi16(static_cast<short>(range.count));
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i key = _mm512_loadu_si512(scores);
  if (kMagnitude) {
    key = _mm512_and_si512(key, magnitude);
  } else {
    key = _mm512_xor_si512(key, _mm512_and_si512(_mm512_srai_epi16(key, 15), magnitude));
  }
  return _mm512_cmplt_epu16_mask(_mm512_sub_epi16(key, low), count);
}

template <bool kMagnitude>
inline uint32_t keep_bits(const uint32_t* scores, KeepRange range) {
  const __m512i low = _mm512_set1_epi32(static_cast<int>(range.low));
  const __m512i count = _mm512_set1_epi32(static_cast<int>(range.count));
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  uint32_t bits = 0;
  for (int half = 0; half < 2; ++half) {
    __m512i key = _mm512_loadu_si512(scores + 16 * half);
    if (kMagnitude) {
      key = _mm512_and_si512(key, magnitude);
    } else {
      key = _mm512_xor_si512(key, _mm512_and_si512(_mm512_srai_epi32(key, 31), magnitude));
    }
    const uint32_t sixteen = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(key, low), count);
    bits |= sixteen << (16 * half);
  }
  return bits;
}

inline void select(uint16_t* out, const uint16_t* weight, uint32_t bits) {
  _mm512_storeu_si512(out, _mm512_maskz_mov_epi16(bits, _mm512_loadu_si512(weight)));
}

inline void select(uint32_t* out, const uint32_t* weight, uint32_t bits) {
  _mm512_storeu_si512(out, _mm512_maskz_mov_epi32(bits & 0xffff, _mm512_loadu_si512(weight)));
  _mm512_storeu_si512(out + 16, _mm512_maskz_mov_epi32(bits >> 16, _mm512_loadu_si512(weight + 16)));
}

#elif defined(__AVX2__)

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

template <bool kMagnitude>
inline uint32_t keep_bits(const uint16_t* scores, KeepRange range) {
  const __m256i low = _mm256_set1_epi16(static_cast<short>(range.low));
  const __m256i count = _mm256_set1_epi16(static_cast<short>(range.count));
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i dropped[2];
  for (int half = 0; half < 2; ++half) {
    __m256i key = load(scores + 16 * half);
    if (kMagnitude) {
      key = _mm256_and_si256(key, magnitude);
    } else {
      key = _mm256_xor_si256(key, _mm256_and_si256(_mm256_srai_epi16(key, 15), magnitude));
    }
    key = _mm256_sub_epi16(key, low);
    dropped[half] = _mm256_cmpeq_epi16(_mm256_max_epu16(key, count), key);  // key >= count
  }
  // packs works within 128-bit lanes: 0xd8 puts the quarters back in order.
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(dropped[0], dropped[1]), 0xd8);
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}

template <bool kMagnitude>
inline uint32_t keep_bits(const uint32_t* scores, KeepRange range) {
  const __m256i low = _mm256_set1_epi32(static_cast<int>(range.low));
  const __m256i count = _mm256_set1_epi32(static_cast<int>(range.count));
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  uint32_t dropped = 0;
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m256i key = load(scores + 8 * quarter);
    if (kMagnitude) {
      key = _mm256_and_si256(key, magnitude);
    } else {
      key = _mm256_xor_si256(key, _mm256_and_si256(_mm256_srai_epi32(key, 31), magnitude));
    }
    key = _mm256_sub_epi32(key, low);
    const __m256i out = _mm256_cmpeq_epi32(_mm256_max_epu32(key, count), key);
    dropped |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(out))) << (8 * quarter);
  }
  return ~dropped;
}

inline void select(uint16_t* out, const uint16_t* weight, uint32_t bits) {
  const __m256i one_bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                            static_cast<short>(32768));
  for (int half = 0; half < 2; ++half) {
    const __m256i word = _mm256_set1_epi16(static_cast<short>(bits >> (16 * half)));
    const __m256i keep = _mm256_cmpeq_epi16(_mm256_and_si256(word, one_bit), one_bit);
    store(out + 16 * half, _mm256_and_si256(keep, load(weight + 16 * half)));
  }
}

inline void select(uint32_t* out, const uint32_t* weight, uint32_t bits) {
  const __m256i one_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int quarter = 0; quarter < 4; ++quarter) {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(bits >> (8 * quarter)));
    const __m256i keep = _mm256_cmpeq_epi32(_mm256_and_si256(word, one_bit), one_bit);
    store(out + 8 * quarter, _mm256_and_si256(keep, load(weight + 8 * quarter)));
  }
}

#else

template <bool kMagnitude, typename Bits>
inline bool keeps(Bits score, KeepRange range) {
  constexpr Bits kMagnitudeBits = static_cast<Bits>(~Bits{0}) >> 1;
  const Bits negative = static_cast<Bits>(-(score >> (8 * sizeof(Bits) - 1)));  // all ones or 0
  const Bits key = kMagnitude ? score & kMagnitudeBits : score ^ (negative & kMagnitudeBits);
  return static_cast<Bits>(key - static_cast<Bits>(range.low)) < static_cast<Bits>(range.count);
}

template <bool kMagnitude, typename Bits>
inline uint32_t keep_bits(const Bits* scores, KeepRange range) {
  uint32_t bits = 0;
  for (int j = 0; j < kStep; ++j) bits |= static_cast<uint32_t>(keeps<kMagnitude>(scores[j], range)) << j;
  return bits;
}

template <typename Bits>
inline void select(Bits* out, const Bits* weight, uint32_t bits) {
  for (int j = 0; j < kStep; ++j) {
    out[j] = weight[j] & static_cast<Bits>(-static_cast<Bits>((bits >> j) & 1));
  }
}

#endif

// ------------------------------------------------------------------------------------------------ a row of words

inline uint32_t low_bits(int64_t n) { return n >= kStep ? ~0u : (1u << n) - 1; }

// keep_bits() for the last n < 32 columns, without reading beyond them.
template <bool kMagnitude, typename Bits>
inline uint32_t keep_bits_of_tail(const Bits* scores, KeepRange range, int64_t n) {
  Bits padded[kStep] = {};
  std::memcpy(padded, scores, n * sizeof(Bits));
  return keep_bits<kMagnitude>(padded, range) & low_bits(n);
}

// Calls visit(first column, columns, word) for each word of the row.
template <bool kMagnitude, typename Bits, typename Visit>
inline void visit_words(const Bits* scores, KeepRange range, int64_t columns, Visit visit) {
  int64_t j = 0;
  for (; j + kStep <= columns; j += kStep) {
    visit(j, int64_t{kStep}, keep_bits<kMagnitude>(scores + j, range));
  }
  if (j < columns) visit(j, columns - j, keep_bits_of_tail<kMagnitude>(scores + j, range, columns - j));
}

template <typename Visit>
inline void visit_words(const void* scores, Format format, KeepRange range, int64_t columns, Visit visit) {
  if (format == Format::kFloat32) {
    auto* s = static_cast<const uint32_t*>(scores);
    range.magnitude ? visit_words<true>(s, range, columns, visit) : visit_words<false>(s, range, columns, visit);
  } else {
    auto* s = static_cast<const uint16_t*>(scores);
    range.magnitude ? visit_words<true>(s, range, columns, visit) : visit_words<false>(s, range, columns, visit);
  }
}
