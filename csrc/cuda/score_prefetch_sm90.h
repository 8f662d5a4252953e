// CUTLASS's epilogue load warp prefetches into L2 what a tile's epilogue reads, while the tile's product is summed.
//
// In CUTLASS, that warp and the epilogue meet at each subtile, with a fence that waits for the epilogue's own loads.
// Here they meet once per tile: the warp prefetches a tile when the tile before it is stored.
#pragma once

#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>

#include "score_factor.h"

namespace mft::cuda {

CUTLASS_DEVICE void prefetch_line([[maybe_unused]] const void* place) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
#elif defined(MFT_PREFETCHED)
  MFT_PREFETCHED(place);  // a test counts the calls
#endif
}

// A tile of the matrix, and the lane of the warp that prefetches it.
struct PrefetchTile {
  int row, end_row, column, end_column, lane;

  // Neighbouring lanes take neighbouring lines of 128 bytes.
  template <int kColumns, class E>
  CUTLASS_DEVICE void elements(const E* matrix, int64_t stride) const {
    constexpr int kLine = 128 / sizeof(E), kLines = kColumns / kLine;
    const int c = column + lane % kLines * kLine;
    if (c >= end_column) return;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int64_t r = row + lane / kLines; r < end_row; r += 32 / kLines) prefetch_line(matrix + r * stride + c);
  }

  // Words of 32 columns; a row may begin anywhere in a line.
  CUTLASS_DEVICE void bits(const uint32_t* words, int64_t stride) const {
    CUTLASS_PRAGMA_NO_UNROLL
    for (int64_t r = row + lane; r < end_row; r += 32) {
      prefetch_line(words + r * stride + column / 32);
      prefetch_line(words + r * stride + (end_column - 1) / 32);
    }
  }
};

// Base: a collective epilogue without source C, whose visitor loads nothing by TMA.
template <class Base>
struct PrefetchingEpilogue : Base {
  using typename Base::LoadPipeline;
  using typename Base::LoadPipelineState;
  using typename Base::Params;
  using typename Base::StorePipeline;
  using typename Base::StorePipelineState;
  using typename Base::TensorStorage;

  CUTLASS_DEVICE PrefetchingEpilogue(const Params& params, TensorStorage& storage)
      : Base(params, storage), inputs(params.thread) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return true; }

  template <class Problem, class Tile, class Place, class... Rest>
  CUTLASS_DEVICE LoadPipelineState load(LoadPipeline pipeline, LoadPipelineState state, const Problem& problem,
                                        const Tile&, const Place& place, const Rest&...) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (uint32_t stage = 0; stage < LoadPipeline::Stages; ++stage, ++state) {
      pipeline.producer_acquire(state);
      pipeline.producer_commit(state);
    }
    constexpr int kRows = cute::size<0>(Tile{}), kColumns = cute::size<1>(Tile{});
    const int row = cute::get<0>(place) * kRows, column = cute::get<1>(place) * kColumns;
    const int lane = cutlass::canonical_lane_idx();
    fetch<kColumns>({row, cute::min(row + kRows, cute::get<0>(problem)), column,
                     cute::min(column + kColumns, cute::get<1>(problem)), lane});
    return state;
  }

  template <class... Rest>
  CUTLASS_DEVICE auto store(LoadPipeline load_pipeline, LoadPipelineState load_state, StorePipeline store_pipeline,
                            StorePipelineState store_state, Rest&&... rest) {
    const auto states =
        Base::store(load_pipeline, load_state, store_pipeline, store_state, static_cast<Rest&&>(rest)...);
    CUTLASS_PRAGMA_NO_UNROLL
    for (uint32_t stage = 0; stage < LoadPipeline::Stages; ++stage, ++load_state) {
      // If this released before the warp has acquired, the barrier's phase would run ahead of the warp. A phase has the
      // same parity as the one two phases later, so the warp would wait forever for a phase that is over.
      load_pipeline.consumer_wait(load_state);
      load_pipeline.consumer_release(load_state);
    }
    return cute::make_tuple(load_state, cute::get<1>(states));
  }

 private:
  using Inputs = decltype(Params::thread);
  const Inputs& inputs;

  template <int kColumns>
  CUTLASS_DEVICE void fetch(const PrefetchTile& tile) const {
    const Inputs& a = inputs;
    if (a.weight != nullptr) tile.template elements<kColumns>(a.weight, a.weight_stride);
    if (a.d_scores != nullptr) tile.template elements<kColumns>(a.d_scores, a.d_scores_stride);
    if (a.source == SignSource::kBits) {
      tile.bits(static_cast<const uint32_t*>(a.signs), a.sign_stride);
    } else if (a.source == SignSource::kHalves) {
      tile.template elements<kColumns>(static_cast<const uint16_t*>(a.signs), a.sign_stride);
    } else if (a.source == SignSource::kFloats) {
      tile.template elements<kColumns>(static_cast<const float*>(a.signs), a.sign_stride);
    }
  }
};

}  // namespace mft::cuda
