// The blocked GEMM of gemm.h by AVX-512 in fp32; 16-bit formats are widened while they are packed, which is exact.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "gemm.h"

namespace mft {
namespace {

#include "gemm_parts.inl"

struct FusedMultiplyAdd {
  static __m512 add_product(__m512 sum, __m512i row, __m512i column) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(column), sum);
  }
};

template <Format kFormat>
struct Singles {
  using Element = std::conditional_t<kFormat == Format::kFloat32, float, uint16_t>;

  template <typename Keep>
  static void pack_row_with(uint32_t* a, const void* row, Keep keep, int64_t depth) {
    for (int64_t j = 0; j < depth; j += 32) {  // a has room for whole steps of 16, and its padding must be zero
      const __mmask32 kept = keep(j, depth - j);
      _mm512_storeu_ps(a + j, load_as_float<kFormat>(row, j, half_of(kept, 0)));
      if (depth - j > 16) _mm512_storeu_ps(a + j + 16, load_as_float<kFormat>(row, j + 16, half_of(kept, 1)));
    }
  }

  template <typename Keep>
  static void pack_group_with(uint32_t* b, int64_t panel_stride, const void* row, Keep keep, int64_t columns) {
    for (int64_t j = 0; j < columns; j += 32, b += panel_stride) {
      const __mmask32 kept = keep(j, columns - j);
      _mm512_storeu_ps(b, load_as_float<kFormat>(row, j, half_of(kept, 0)));
      _mm512_storeu_ps(b + 16, load_as_float<kFormat>(row, j + 16, half_of(kept, 1)));
    }
  }

  static void pack_row(uint32_t* a, const void* row, int64_t depth) { pack_row_with(a, row, KeepAll{}, depth); }

  static void pack_masked_row(uint32_t* a, const void* row, MaskRow mask, Format score_format, int64_t depth) {
    with_keep(mask, score_format, [=](auto keep) { pack_row_with(a, row, keep, depth); });
  }

  static void pack_group(uint32_t* b, int64_t panel_stride, const void* row, const void*, int64_t columns) {
    pack_group_with(b, panel_stride, row, KeepAll{}, columns);
  }

  static void pack_masked_group(uint32_t* b, int64_t panel_stride, const void* row, const void*, MaskRow mask, MaskRow,
                                Format score_format, int64_t columns) {
    with_keep(mask, score_format, [=](auto keep) { pack_group_with(b, panel_stride, row, keep, columns); });
  }

  // out[c * out_stride + r] = matrix[r, c] for up to 16 `rows` and `columns`, zeros beyond.
  static void transpose_block(uint32_t* out, int64_t out_stride, const Element* matrix, int64_t row_stride, int64_t rows,
                              int64_t columns) {
    __m512i block[16];
    for (int i = 0; i < 16; ++i) {
      const __mmask16 inside = i < rows ? first16(columns) : 0;
      block[i] = _mm512_castps_si512(load_as_float<kFormat>(inside != 0 ? matrix + i * row_stride : matrix, 0, inside));
    }
    transpose(block);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * out_stride, block[i]);
  }

  static void pack_transposed_panel(uint32_t* b, int64_t columns, const void* matrix, int64_t row_stride, int64_t rows,
                                    int64_t depth) {
    for (int64_t d = 0; d < depth; d += 16) {
      for (int64_t r = 0; r < columns; r += 16) {
        const int64_t row = r < rows ? r : 0;
        transpose_block(b + d * columns + r, columns, as<Element>(matrix) + row * row_stride + d, row_stride,
                        rows - r, depth - d);
      }
    }
  }

  static void pack_transposed_block(uint32_t* a, const void* matrix, int64_t row_stride, int64_t depth,
                                    int64_t columns) {
    for (int64_t d = 0; d < depth; d += 16) {
      for (int64_t j = 0; j < columns; j += 16) {
        transpose_block(a + j * kRowStride + d, kRowStride, as<Element>(matrix) + d * row_stride + j, row_stride,
                        depth - d, columns - j);
      }
    }
  }
};

template <Format kFormat>
Gemm make_gemm() {
  using Pack = Singles<kFormat>;
  Gemm gemm{};
  gemm.format = kFormat;
  gemm.per_group = 1;
  gemm.tile_rows = kVectorTileRows;
  gemm.prefetch_groups = kPrefetchGroups;
  gemm.rows_ahead = 8;
  gemm.narrow_bytes = 1 << 20;
  // From sweeps on Sapphire Rapids (2 MiB L2 per core, 2 threads, N = K = 4096, M = 512 and 4096).
  // The sums of 4096 tokens, 3 MB, are read once per block. With 1024 tokens the weight is packed four times: 1.28
  // dense products instead of 1.05.
  gemm.tokens = 4096;
  gemm.grad_tokens = 1024;
  gemm.weight_rows = 192;
  gemm.grad_depth = 128;
  gemm.weight_columns = 512;
  gemm.task_columns = 1024;  // a page of a row; with half a page d_x took 1.20 dense products at M = 512, not 1.06
  gemm.factor_rows = kVectorTileRows;
  gemm.factors_ahead = gemm.panels_bytes = 0;
  gemm.tiles_by_blocks = 16;
  gemm.multiply = multiply_vectors<FusedMultiplyAdd>;
  gemm.prefetch_tile = prefetch_tile;
  gemm.pack_row = Pack::pack_row;
  gemm.pack_masked_row = Pack::pack_masked_row;
  gemm.pack_group = Pack::pack_group;
  gemm.pack_masked_group = Pack::pack_masked_group;
  gemm.pack_transposed_panel = Pack::pack_transposed_panel;
  gemm.pack_transposed_block = Pack::pack_transposed_block;
  gemm.store_row = store_row<kFormat>;
  gemm.store_transposed = store_transposed<kFormat>;
  gemm.store_score_grad = store_score_grad<kFormat>;
  gemm.prefetch_score_grad = prefetch_score_grad<kFormat>;
  gemm.finish_streams = finish_streams;
  return gemm;
}

}  // namespace

const Gemm& float32_gemm(Format format) {
  static const Gemm tables[] = {make_gemm<Format::kFloat32>(), make_gemm<Format::kBFloat16>(),
                                make_gemm<Format::kFloat16>()};
  return tables[static_cast<int>(format)];
}

}  // namespace mft
