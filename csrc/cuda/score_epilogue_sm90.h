// The epilogue visitor of d_scores on Hopper: d_scores = [d_scores +] G [* weight] * sign, while G is in registers.
//
// The accumulators of a thread in a subtile of 128 x 32 are 2 rows, 8 apart, of 4 pairs of columns, 8 apart:
//
//   lane 4 g + q of warp w:   rows 16 w + g and 16 w + g + 8,   columns 2 q + {0, 1} + {0, 8, 16, 24}
//
// A thread reads weight, d_scores and signs at exactly these places, directly from global memory and one subtile ahead.
// A warp's load covers 8 rows. For an fp32 matrix it reads whole sectors of 32 bytes. For a 16-bit matrix it reads half
// sectors; the next load reads the other half, from L1. For signs it reads one word of 32 per row. The warp that
// CUTLASS keeps for epilogue loads brings the whole tile into L2 while the tile's product is still being summed.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "api.h"
#include "keep.h"
#include "score_factor.h"

namespace mft::cuda {

template <class T>
struct CutlassTypeOf;
template <>
struct CutlassTypeOf<float> {
  using Type = float;
};
template <>
struct CutlassTypeOf<BFloat16> {
  using Type = cutlass::bfloat16_t;
};
template <>
struct CutlassTypeOf<Float16> {
  using Type = cutlass::half_t;
};
template <class T>
using CutlassType = typename CutlassTypeOf<T>::Type;

// Load a pair of 16-bit elements that the kernel never writes.
CUTLASS_DEVICE uint32_t load_word(const void* place) {
#ifdef __CUDA_ARCH__
  return __ldg(static_cast<const unsigned*>(place));
#else
  return *static_cast<const uint32_t*>(place);
#endif
}

// Load a pair of 16-bit d_scores. A warp reads half sectors; the other halves are then found in L1.
CUTLASS_DEVICE void load_pair(uint32_t (&pair)[1], const void* place) {
  pair[0] = *static_cast<const uint32_t*>(place);
}

// Load a pair of 32-bit elements. A warp reads whole sectors, so L1 has nothing to keep.
CUTLASS_DEVICE void load_pair(uint32_t (&pair)[2], const void* place) {
#ifdef __CUDA_ARCH__
  const uint2 words = __ldcg(static_cast<const uint2*>(place));
  pair[0] = words.x;
  pair[1] = words.y;
#else
  pair[0] = static_cast<const uint32_t*>(place)[0];
  pair[1] = static_cast<const uint32_t*>(place)[1];
#endif
}

// This fails to compile if the layout above is not CUTLASS's.
template <class Layout>
CUTLASS_DEVICE void check_places(Layout) {
  static_assert(cute::size<0>(Layout{}) * cute::size<1>(Layout{}) * cute::size<2>(Layout{}) == 16);
  static_assert(cute::size<3>(Layout{}) == 1);
  cute::for_each(cute::make_seq<cute::size(Layout{})>{}, []([[maybe_unused]] auto index) {
    constexpr int i = decltype(index)::value;
    using Place = decltype(Layout{}(cute::Int<i>{}));
    static_assert(cute::get<0>(Place{}) == i / 2 % 2 * 8);
    static_assert(cute::get<1>(Place{}) == i / 16 * 32 + i % 16 / 4 * 8 + i % 2);
  });
}

// T: of weight; D: of d_scores.
template <class T, class D>
struct ScoreEpilogue {
  struct Arguments {
    const T* weight;    // null: not a factor
    const D* d_scores;  // null: not added to
    const void* signs;
    int64_t weight_stride, d_scores_stride, sign_stride;  // in elements; for bits, in words
    SignSource source;
    uint32_t infinity;  // of 16-bit scores
  };

  static Arguments arguments_of(const ScoreGrad& problem) {
    const Sign& sign = problem.sign;
    Arguments a{};
    a.weight = static_cast<const T*>(problem.weight.data);
    a.weight_stride = problem.weight.stride;
    if (problem.accumulate) a.d_scores = static_cast<const D*>(problem.d_scores.data);
    a.d_scores_stride = problem.d_scores.stride;
    if (sign.words != nullptr) {
      a.source = SignSource::kBits;
      a.signs = sign.words;
      a.sign_stride = (problem.weight.columns + 31) / 32;
    } else if (sign.scores.data != nullptr) {
      a.source = sign.scores.type == Type::kFloat32 ? SignSource::kFloats : SignSource::kHalves;
      a.signs = sign.scores.data;
      a.sign_stride = sign.scores.stride;
      a.infinity = sign.scores.type == Type::kBFloat16 ? kInfinity<BFloat16> : kInfinity<Float16>;
    }
    return a;
  }

  // The rest is what CUTLASS requires of a visitor.
  using Params = Arguments;
  struct SharedStorage {};

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE ScoreEpilogue() {}
  CUTLASS_HOST_DEVICE ScoreEpilogue(const Params& params, const SharedStorage&) : params_(&params) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args) {
    using Places = typename decltype(args.tCcD)::layout_type;  // starting at the thread's first place
    check_places(Places{});
    const int rows = cute::get<0>(args.residue_tCcD), columns = cute::get<1>(args.residue_tCcD);  // left from there
    const int row = cute::get<0>(args.problem_shape_mnkl) - rows;
    const int column = cute::get<1>(args.problem_shape_mnkl) - columns;
    return Store<cute::size<4>(Places{})>(*params_, row, column, rows, columns);
  }

 private:
  const Params* params_;

  // What a thread reads for one subtile: 2 rows of 4 pairs.
  struct Inputs {
    uint32_t weight[2][4];
    uint32_t old[2][4][sizeof(D) / 2];  // of d_scores
    uint32_t bits[2];                   // signs
  };

  // One thread's share of a tile.
  template <int kSubtiles>
  struct Store : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Store(const Params& params, int row, int column, int rows, int columns)
        : p(params), first_bit(column % 32) {
      CUTLASS_PRAGMA_UNROLL
      for (int r = 0; r < 2; ++r) {
        left[r] = 8 * r < rows ? columns : 0;
        const int64_t at = row + 8 * r;
        weight[r] = p.weight + at * p.weight_stride + column;
        old[r] = p.d_scores + at * p.d_scores_stride + column;
        const int64_t sign_row = at * p.sign_stride;
        signs[r] = p.source == SignSource::kBits     ? place<uint32_t>(sign_row + column / 32)
                   : p.source == SignSource::kHalves ? place<uint16_t>(sign_row + column)
                                                     : place<float>(sign_row + column);
      }
    }

    CUTLASS_DEVICE void begin() {
      // These are added if d_scores is not.
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 8; ++i) {
        for (uint32_t& word : inputs[0].old[i % 2][i / 2]) word = kNothings;
        for (uint32_t& word : inputs[1].old[i % 2][i / 2]) word = kNothings;
      }
      load(inputs[0], 0);
      load(inputs[1], 1);
    }

    CUTLASS_DEVICE auto visit(const cutlass::Array<float, 16>& g, int, int, int subtile) {
      const Inputs& in = inputs[subtile % 2];
      float value[16];  // 4 blocks of columns, 2 rows, 2 columns
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 16; ++i) value[i] = g[i];
      if (p.weight != nullptr) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) {
          const uint32_t pair = in.weight[i % 2][i / 2];
          value[2 * i] = product(value[2 * i], low_of<T>(pair));
          value[2 * i + 1] = product(value[2 * i + 1], high_of<T>(pair));
        }
      }
      apply_signs(value, in, subtile);
      cutlass::Array<CutlassType<D>, 16> result;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 8; ++i) {
        const auto& before = in.old[i % 2][i / 2];
        if constexpr (sizeof(D) == 4) {
          result[2 * i] = accumulated(value[2 * i], isa::as_float(before[0]));
          result[2 * i + 1] = accumulated(value[2 * i + 1], isa::as_float(before[1]));
        } else {
          reinterpret_cast<uint32_t*>(&result)[i] =
              isa::round_pair<D>(accumulated(value[2 * i], low_of<D>(before[0])),
                                 accumulated(value[2 * i + 1], high_of<D>(before[0])));
        }
      }
      return result;
    }

    // Called after the fence and the barriers of the TMA store, which would wait for loads issued before them.
    CUTLASS_DEVICE void postreduce(int, int subtile, int, bool) {
      if (subtile + 2 < kSubtiles) load(inputs[subtile % 2], subtile + 2);
    }

   private:
    static constexpr uint32_t kNothings = sizeof(D) == 4 ? 0x80000000 : 0x80008000;

    const Params& p;
    const T* weight[2];  // the thread's first place in both its rows
    const D* old[2];
    const void* signs[2];
    int left[2];  // columns from there to the matrix's end; 0 in a row below it
    int first_bit;
    Inputs inputs[2];

    template <class E>
    CUTLASS_DEVICE const void* place(int64_t offset) const {
      return static_cast<const E*>(p.signs) + offset;
    }

    // N and K are multiples of 8, so a block of 8 columns is in the matrix or not.
    CUTLASS_DEVICE bool inside(int r, int column) const { return column < left[r]; }

    CUTLASS_DEVICE void load(Inputs& in, int subtile) const {
      if (p.weight != nullptr) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int r = i % 2, block = i / 2, column = 32 * subtile + 8 * block;
          if (inside(r, column)) in.weight[r][block] = load_word(weight[r] + column);
        }
      }
      if (p.d_scores != nullptr) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int r = i % 2, block = i / 2, column = 32 * subtile + 8 * block;
          if (inside(r, column)) load_pair(in.old[r][block], old[r] + column);
        }
      }
      if (p.source == SignSource::kBits) {
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
          if (inside(r, 32 * subtile)) in.bits[r] = load_word(static_cast<const uint32_t*>(signs[r]) + subtile);
        }
      }
    }

    CUTLASS_DEVICE void apply_signs(float (&value)[16], const Inputs& in, int subtile) const {
      if (p.source == SignSource::kBits) {
        const uint32_t bits[2] = {in.bits[0] >> first_bit, in.bits[1] >> first_bit};
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 16; ++i) value[i] = signed_by_bit(value[i], bits[i / 2 % 2], i / 4 * 8 + i % 2);
      } else if (p.source == SignSource::kHalves) {  // not read ahead: that would take registers from the best path
        uint32_t pairs[8];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int r = i % 2, column = 32 * subtile + i / 2 * 8;
          pairs[i] = inside(r, column) ? load_word(static_cast<const uint16_t*>(signs[r]) + column) : 0;
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 16; ++i) value[i] *= sign_of_half(pairs[i / 2] >> i % 2 * 16 & 0xffff, p.infinity);
      } else if (p.source == SignSource::kFloats) {
        uint32_t scores[8][2] = {};
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int r = i % 2, column = 32 * subtile + i / 2 * 8;
          if (inside(r, column)) load_pair(scores[i], static_cast<const float*>(signs[r]) + column);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 16; ++i) value[i] *= sign_of(isa::as_float(scores[i / 2][i % 2]));
      }
    }
  };
};

}  // namespace mft::cuda
