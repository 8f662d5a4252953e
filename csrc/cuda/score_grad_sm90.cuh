// d_scores on Hopper: CUTLASS's persistent GEMM with the factor of d_scores in its epilogue.
//
//   G (N, K) = grad_output.T @ x,  summed in fp32 over the M tokens,  d_scores = [d_scores +] G [* weight] * sign
//
// A block of 3 warpgroups (1 loads by TMA, 2 multiply) owns tiles of 128 x 256, with 64 tokens per stage. Two blocks
// that are neighbours in N share x by multicast. N, K and M are the M, N and K of CUTLASS.
//
// The kernel has 4 stages, and 168 registers at launch (232 in the warpgroups that multiply). It does not spill under
// nvcc 13.0 and 13.5. Shared memory is 231,424 bytes with fp32 d_scores, 214,016 with 16-bit ones. These alternatives
// were compiled too; neither they nor this kernel were timed:
//
//   weight and scores by auxiliary TMA loads               3 stages at 128 x 256
//   weight as CUTLASS's source C                           5 stages at 128 x 128
//   the old d_scores as C, fp32                            3 stages at 128 x 128
//   direct loads in CUTLASS's epilogue load pipeline       spills 32 bytes (13.5); one more fence and wait per subtile
//   16-bit scores read one subtile ahead like signs        spills 48 bytes (13.0, 16-bit d_scores)
//
// Three choices are made at run time, by branches that all threads take alike: whether weight is a factor, which source
// of signs is read, and whether d_scores is added to. A kernel compiles in about 25 s, and there are two per 16-bit
// type.
#pragma once

#include <cuda_runtime.h>

#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler_params.h>

#include "api.h"
#include "launch_device.h"
#include "score_epilogue_sm90.h"
#include "score_prefetch_sm90.h"

namespace mft::cuda {

// T: of grad_output, x and weight; D: of d_scores.
template <class T, class D>
struct ScoreGradSm90 {
  using Element = CutlassType<T>;
  using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Epilogue = PrefetchingEpilogue<typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cute::Shape<cute::_128, cute::_32>, float,
      float, void, cutlass::layout::RowMajor, 16 / sizeof(D), CutlassType<D>, cutlass::layout::RowMajor,
      16 / sizeof(D), cutlass::epilogue::TmaWarpSpecializedCooperative, ScoreEpilogue<T, D>>::CollectiveOp>;
  // In both operands the tokens, which are summed over, are the slow index.
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::ColumnMajor, 8, Element,
      cutlass::layout::RowMajor, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  static_assert(Mainloop::DispatchPolicy::Stages == 4);

  static std::string launch(const ScoreGrad& problem, const Device& device) {
    const typename Kernel::Arguments arguments = arguments_of(problem, device);
    if (!Kernel::can_implement(arguments) || Kernel::get_workspace_size(arguments) != 0) {
      return "the sm_90 kernel of d_scores does not take this problem: its refusal and CUTLASS disagree";
    }
    const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
    cudaLaunchConfig_t configuration = {};
    configuration.gridDim = Kernel::get_grid_shape(params);
    configuration.blockDim = Kernel::get_block_shape();
    configuration.dynamicSmemBytes = Kernel::SharedStorageSize;
    configuration.stream = static_cast<cudaStream_t>(device.stream);
    const dim3 cluster(cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), cute::size<2>(Cluster{}));
    return launch_entry<Kernel>(&cutlass::device_kernel<Kernel>, configuration, cluster, params);
  }

  static typename Kernel::Arguments arguments_of(const ScoreGrad& problem, const Device& device) {
    using cute::_1;
    const int n = static_cast<int>(problem.weight.rows), k = static_cast<int>(problem.weight.columns);
    const int m = static_cast<int>(problem.x.rows);
    typename Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = cute::make_shape(n, k, m, 1);
    arguments.mainloop.ptr_A = static_cast<const Element*>(problem.grad_output.data);
    arguments.mainloop.dA = {_1{}, problem.grad_output.stride, 0};
    arguments.mainloop.ptr_B = static_cast<const Element*>(problem.x.data);
    arguments.mainloop.dB = {_1{}, problem.x.stride, 0};
    arguments.epilogue.thread = ScoreEpilogue<T, D>::arguments_of(problem);
    arguments.epilogue.ptr_D = static_cast<const CutlassType<D>*>(problem.d_scores.data);
    arguments.epilogue.dD = {problem.d_scores.stride, _1{}, 0};
    arguments.hw_info.sm_count = device.multiprocessors;
    // Neighbouring tiles in squares, so that fewer columns of grad_output and x pass through L2 at a time.
    arguments.scheduler.max_swizzle_size = 8;
    return arguments;
  }
};

}  // namespace mft::cuda
