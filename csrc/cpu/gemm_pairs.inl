// Packing of bf16 in pairs, and the table of gemm.h without its multiplication.
//
// Included into an anonymous namespace of namespace mft, after gemm_parts.inl.

// Interleaves two rows: writes 16 pairs of columns 0 .. 15, then 16 pairs of columns 16 .. 31.
inline void interleave(uint32_t* out, int64_t halves_apart, __m512i even, __m512i odd) {
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(out + halves_apart, _mm512_permutex2var_epi16(even, high, odd));
}

template <typename Keep>
inline void pack_row_with(uint32_t* a, const void* row, Keep keep, int64_t depth) {
  for (int64_t j = 0; j < depth; j += 32) {  // a has room for whole steps, and its padding must be zero
    _mm512_storeu_si512(a + j / 2, _mm512_maskz_loadu_epi16(keep(j, depth - j), as<uint16_t>(row) + j));
  }
}

template <typename Keep>
inline void pack_group_with(uint32_t* b, int64_t panel_stride, const void* even, const void* odd, Keep keep_even,
                            Keep keep_odd, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 32, b += panel_stride) {
    const __m512i first = _mm512_maskz_loadu_epi16(keep_even(j, columns - j), as<uint16_t>(even) + j);
    const __m512i second = odd != nullptr
                               ? _mm512_maskz_loadu_epi16(keep_odd(j, columns - j), as<uint16_t>(odd) + j)
                               : _mm512_setzero_si512();
    interleave(b, 16, first, second);
  }
}

void pack_row(uint32_t* a, const void* row, int64_t depth) { pack_row_with(a, row, KeepAll{}, depth); }

void pack_masked_row(uint32_t* a, const void* row, MaskRow mask, Format score_format, int64_t depth) {
  with_keep(mask, score_format, [=](auto keep) { pack_row_with(a, row, keep, depth); });
}

void pack_group(uint32_t* b, int64_t panel_stride, const void* even, const void* odd, int64_t columns) {
  pack_group_with(b, panel_stride, even, odd, KeepAll{}, KeepAll{}, columns);
}

void pack_masked_group(uint32_t* b, int64_t panel_stride, const void* even, const void* odd, MaskRow even_mask,
                       MaskRow odd_mask, Format score_format, int64_t columns) {
  with_keep(even_mask, score_format, [=](auto keep) {
    pack_group_with(b, panel_stride, even, odd, keep, decltype(keep)(odd_mask), columns);
  });
}

void pack_transposed_panel(uint32_t* b, int64_t columns, const void* matrix, int64_t row_stride, int64_t rows,
                           int64_t depth) {
  for (int64_t d = 0; d < depth; d += 32) {
    for (int64_t r = 0; r < columns; r += 16) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) {
        const __mmask32 inside = r + i < rows ? first32(depth - d) : 0;
        block[i] = _mm512_maskz_loadu_epi16(inside, as<uint16_t>(matrix) + (inside != 0 ? (r + i) * row_stride + d : 0));
      }
      transpose(block);
      for (int p = 0; p < 16; ++p) _mm512_storeu_si512(b + (d / 2 + p) * columns + r, block[p]);
    }
  }
}

void pack_transposed_block(uint32_t* a, const void* matrix, int64_t row_stride, int64_t depth, int64_t columns) {
  for (int64_t d = 0; d < depth; d += 32) {
    for (int64_t j = 0; j < columns; j += 32) {
      const __mmask32 inside = first32(columns - j);
      __m512i left[16], right[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t even = d + 2 * i;
        const uint16_t* row = as<uint16_t>(matrix) + even * row_stride + j;
        alignas(64) uint32_t pairs[32];
        interleave(pairs, 16, even < depth ? _mm512_maskz_loadu_epi16(inside, row) : _mm512_setzero_si512(),
                   even + 1 < depth ? _mm512_maskz_loadu_epi16(inside, row + row_stride) : _mm512_setzero_si512());
        left[i] = _mm512_load_si512(pairs);
        right[i] = _mm512_load_si512(pairs + 16);
      }
      transpose(left);
      transpose(right);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(a + (j + i) * kRowStride + d / 2, left[i]);
        _mm512_storeu_si512(a + (j + 16 + i) * kRowStride + d / 2, right[i]);
      }
    }
  }
}

inline Gemm gemm_of_pairs() {
  Gemm gemm{};
  gemm.format = Format::kBFloat16;
  gemm.per_group = 2;
  gemm.prefetch_tile = prefetch_tile;
  gemm.pack_row = pack_row;
  gemm.pack_masked_row = pack_masked_row;
  gemm.pack_group = pack_group;
  gemm.pack_masked_group = pack_masked_group;
  gemm.pack_transposed_panel = pack_transposed_panel;
  gemm.pack_transposed_block = pack_transposed_block;
  gemm.store_row = store_row<Format::kBFloat16>;
  gemm.store_transposed = store_transposed<Format::kBFloat16>;
  gemm.store_score_grad = store_score_grad<Format::kBFloat16>;
  gemm.prefetch_score_grad = prefetch_score_grad<Format::kBFloat16>;
  gemm.finish_streams = finish_streams;
  return gemm;
}
