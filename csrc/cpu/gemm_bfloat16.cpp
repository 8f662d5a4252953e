// The blocked GEMM of gemm.h in bf16 by AVX512-BF16: vdpbf16ps multiplies pairs of neighbours along the depth.
//
// Measured on one Zen 5 core: 545 GFLOP/s in multiply()'s loop, 2 vdpbf16ps per cycle, for tiles of 12x2, 8x3 and 6x4
// vectors.
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
    // From sweeps on Zen 5 (1 MiB L2 per core, 2 threads, N = K = 4096, M = 64, 512 and 2048, 2026-11-24). Nearby
    // values are as fast. On Zen 4, twice the rows are as fast at M = 512 and 3 % slower at M = 64.
    //
    // From sweeps on Zen 4 (2 threads, all settings in one process, 2026-11-29):
    // rows_ahead: rows are prefetched again while others are packed, because multiply()'s list does not cover all of
    // them. From scores with 16, 64 and 512 tokens, the forward is 25, 4 and 3 % faster (576 x 1536: 5 %), d_x 28, 3
    // and 1 % (5 %). 8 rows are as fast.
    // grad_depth: with blocks of d_x twice as deep, sums travel half as often. This is 2 % faster at M = 512, 4 % at
    // 2048.
    // task_columns: tasks of d_x twice as wide are 4 % faster on 64 tokens. But they are 18 % slower if other work
    // runs, because each thread has only one.
    gemm.rows_ahead = 4;
    gemm.narrow_bytes = 0;
    gemm.tokens = gemm.grad_tokens = 2048;
    gemm.weight_rows = 96;    // 104 KB per block
    gemm.grad_depth = 256;    // 256 KB packed, with 256 columns
    gemm.weight_columns = 256;
    gemm.task_columns = 1024;  // half a page of a bf16 row, because page walks cost
    gemm.factor_rows = kVectorTileRows;
    gemm.factors_ahead = gemm.panels_bytes = 0;
    gemm.tiles_by_blocks = 0;
    gemm.multiply = multiply_vectors<DotProduct>;
    return gemm;
  }();
  return table;
}

}  // namespace mft
