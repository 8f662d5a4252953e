// The blocked GEMM of gemm.h in bf16 by AVX512-BF16: vdpbf16ps multiplies pairs of neighbours along the depth.
//
// Measured on one Zen 5 core: 545 GFLOP/s in multiply()'s loop, 2 vdpbf16ps a cycle, at any of 12x2, 8x3, 6x4 vectors.
#include <immintrin.h>

#include <cstring>

#include "gemm.h"

namespace mft {
namespace {

#include "gemm_parts.inl"
#include "gemm_pairs.inl"

struct DotProduct {
  static __m512 add_product(__m512 sum, __m512i row, __m512i column) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(column));
  }
};

}  // namespace

const Gemm& bfloat16_gemm() {
  static const Gemm table = [] {
    Gemm gemm = gemm_of_pairs();
    gemm.tile_rows = kVectorTileRows;
    gemm.prefetch_groups = kPrefetchGroups;
    // From sweeps on Zen 5 (1 MiB L2 a core, 2 threads, N = K = 4096, M = 64, 512 and 2048, 2026-11-24); flat around
    // them. On Zen 4 twice the rows are level at M = 512 and 3 % slower at M = 64.
    gemm.rows_ahead = 0;
    gemm.narrow_bytes = 0;
    gemm.tokens = gemm.grad_tokens = 2048;
    gemm.weight_rows = 96;    // 104 KB a block
    gemm.grad_depth = 128;    // with 256 columns 128 KB packed
    gemm.weight_columns = 256;
    gemm.task_columns = 1024;  // half a page of a bf16 row, as page walks cost
    gemm.factor_rows = kVectorTileRows;
    gemm.factors_ahead = gemm.panels_bytes = 0;
    gemm.tiles_by_blocks = 0;
    gemm.multiply = multiply_vectors<DotProduct>;
    return gemm;
  }();
  return table;
}

}  // namespace mft
