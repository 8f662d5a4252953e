// Execute CUTLASS's d_scores kernel for Hopper with our load warp and epilogue. Do all warps of both blocks of a
// cluster end? Is each stage read only when it is full, and written only when it is free, however the warps are
// scheduled and whenever TMA finishes?
//
// CUTLASS's own: GemmUniversal (roles of the warps, tiles of a persistent block, states passed from tile to tile), the
// mainloop CollectiveMma (loads with multicast, waits, releases, tails), PipelineTmaAsync, PipelineTransactionAsync,
// PipelineState, OrderedSequenceBarrier, the persistent scheduler.
// Ours, unchanged: load() and store() of score_prefetch_sm90.h.
// Emulated: single instructions, see emulator/cutlass_sm90.h.
// A stand-in: the epilogue below PrefetchingEpilogue. It stores nothing and does not touch its load pipeline, like
// CUTLASS's if its visitor loads nothing; its load_tail is the same as CUTLASS's.
//
// Then the same with one fault at a time, which must be found and named.
#include "emulator/cutlass_sm90.h"

#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/kernel/gemm_universal_decl.h>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp>

#include <cutlass/gemm/collective/collective_builder_decl.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "score_prefetch_sm90.h"

// CUTLASS's host code refers to these functions, but does not reach the calls.
extern "C" {
cudaError_t CUDARTAPI cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
}

namespace {

namespace emulator = mft::cuda::emulator;
namespace isa = mft::cuda::isa;

using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

// As score_grad_sm90.cuh builds it, with the test's number of stages.
template <int kStages>
using CutlassMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::bfloat16_t, cutlass::layout::ColumnMajor, 8,
    cutlass::bfloat16_t, cutlass::layout::RowMajor, 8, float, Tile, Cluster,
    cutlass::gemm::collective::StageCount<kStages>, cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;

enum class Fault {
  kNone,
  kReleaseWithoutWait,    // the epilogue releases a stage that it has not waited for
  kCommitWithoutAcquire,  // the load warp commits a stage that it has not acquired
  kStateForgotten,        // the load warp begins each tile with the state of the first
  kWrongFirstPhase,       // the load warp begins with a consumer's state
  kNoTail,                // the mainloop's load warp ends before its stages are released
  kFewerBytes,            // the mainloop expects fewer bytes than TMA brings
  kBytesOfA,              // the mainloop expects the bytes of A only
};
Fault fault = Fault::kNone;

// CUTLASS's pipeline, or the same without one call.
template <int kStages>
struct LoadPipeline : cutlass::PipelineTransactionAsync<kStages> {
  using Base = cutlass::PipelineTransactionAsync<kStages>;
  using Base::Base;
  using State = typename Base::PipelineState;
  void producer_acquire(State state) {
    if (fault != Fault::kCommitWithoutAcquire) Base::producer_acquire(state);
  }
  void consumer_wait(State state) {
    if (fault != Fault::kReleaseWithoutWait) Base::consumer_wait(state);
  }
};

// CUTLASS's mainloop, or the same without its tail.
template <int kStages>
struct Mainloop : CutlassMainloop<kStages> {
  using Base = CutlassMainloop<kStages>;
  void load_tail(typename Base::MainloopPipeline pipeline, typename Base::PipelineState state) {
    if (fault != Fault::kNoTail) Base::load_tail(pipeline, state);
  }
};

struct Inputs {
  const uint16_t* weight = nullptr;
  int64_t weight_stride = 0, d_scores_stride = 0, sign_stride = 0;
  const float* d_scores = nullptr;
  const void* signs = nullptr;
  mft::cuda::SignSource source = mft::cuda::SignSource::kOne;
};

template <int kStages>
struct SilentEpilogue {
  using ElementC = float;
  using ElementD = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using LoadPipeline = ::LoadPipeline<kStages>;
  using LoadPipelineState = cutlass::PipelineState<kStages>;
  using StorePipeline = cutlass::PipelineTmaStore<2, 1>;
  using StorePipelineState = cutlass::PipelineState<2>;
  using PipelineStorage = typename LoadPipeline::SharedStorage;
  struct TensorStorage {};
  struct Arguments {};
  struct Params {
    Inputs thread;
    uint32_t tma_transaction_bytes = 0;
  };
  static constexpr bool RequiresTransactionBytes = true;

  SilentEpilogue(const Params&, TensorStorage&) {}
  static void prefetch_tma_descriptors(const Params&) {}

  template <class... Rest>
  auto store(LoadPipeline, LoadPipelineState load, StorePipeline, StorePipelineState store, Rest&&...) {
    return cute::make_tuple(load, store);
  }
  void store_tail(LoadPipeline, LoadPipelineState, StorePipeline, StorePipelineState) {}
  auto load_tail(LoadPipeline pipeline, LoadPipelineState state) {
    if (cute::elect_one_sync()) pipeline.producer_tail(state);
    return state;
  }
};

// Our epilogue, or the same with a wrong state.
template <int kStages>
struct Epilogue : mft::cuda::PrefetchingEpilogue<SilentEpilogue<kStages>> {
  using Base = mft::cuda::PrefetchingEpilogue<SilentEpilogue<kStages>>;
  using Base::Base;
  using State = typename Base::LoadPipelineState;
  using Pipeline = typename Base::LoadPipeline;
  template <class... Rest>
  State load(Pipeline pipeline, State state, Rest&&... rest) {
    if (fault == Fault::kWrongFirstPhase && state.count() == 0) state = State{};
    const State next = Base::load(pipeline, state, static_cast<Rest&&>(rest)...);
    return fault == Fault::kStateForgotten ? state : next;
  }
};

template <int kStages, int kEpilogueStages>
struct Protocol {
  using Collective = Mainloop<kStages>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Collective,
                                                      Epilogue<kEpilogueStages>, cutlass::gemm::PersistentScheduler>;
  using Storage = typename Kernel::SharedStorage;

  // Name the barriers and pieces in shared memory.
  static void name_parts() {
    static Storage* const s = static_cast<Storage*>(std::aligned_alloc(1024, (sizeof(Storage) + 1023) / 1024 * 1024));
    const auto at = [](const void* p) { return static_cast<const char*>(p) - reinterpret_cast<const char*>(s); };
    static std::map<int64_t, std::string> names;
    names.clear();
    const auto name = [&](const char* what, const auto* barriers, int count) {
      for (int i = 0; i < count; ++i) names[at(barriers + i)] = std::string(what) + std::to_string(i);
    };
    name("the mainloop's full stage ", s->pipelines.mainloop.full_barrier_, kStages);
    name("the mainloop's empty stage ", s->pipelines.mainloop.empty_barrier_, kStages);
    name("the epilogue's full stage ", s->pipelines.epi_load.full_barrier_.data(), kEpilogueStages);
    name("the epilogue's empty stage ", s->pipelines.epi_load.empty_barrier_.data(), kEpilogueStages);
    name("the order of the load warps ", s->pipelines.load_order.barrier_[0], 2);
    isa::detail::name_of_barrier = [](int64_t offset) { return names.at(offset); };
    emulator::pieces.clear();
    const auto add = [&](const char* what, const auto& operand) {
      const int64_t bytes = sizeof(operand) / kStages;
      for (int i = 0; i < kStages; ++i) {
        emulator::pieces.push_back({at(operand.data()) + i * bytes, bytes, what + std::to_string(i)});
      }
    };
    add("A of stage ", s->tensors.mainloop.smem_A);
    add("B of stage ", s->tensors.mainloop.smem_B);
  }

  // Run one cluster that has `tiles` tiles per block, of `steps` steps each. Return "" or the fault.
  static std::string run(int tiles, int steps, const emulator::Settings& settings) {
    const auto problem = cute::make_shape(256, 256 * tiles, 64 * steps, 1);
    typename Kernel::Params params{};
    params.problem_shape = problem;
    typename Collective::Arguments operands{};
    operands.dA = {cute::_1{}, 256, 0};
    operands.dB = {cute::_1{}, 256 * tiles, 0};
    params.mainloop = Collective::to_underlying_arguments(problem, operands, nullptr);
    if (fault == Fault::kFewerBytes) params.mainloop.tma_transaction_bytes -= 128;
    if (fault == Fault::kBytesOfA) params.mainloop.tma_transaction_bytes = params.mainloop.tma_transaction_bytes_mk;
    params.hw_info.sm_count = 2;
    params.scheduler = Kernel::TileScheduler::to_underlying_arguments(problem, Tile{}, Cluster{}, params.hw_info, {});
    emulator::Launch launch{{2, 1, 1}, 2, static_cast<int>(Kernel::MaxThreadsPerBlock), Kernel::SharedStorageSize, [&] {
                              Kernel kernel;
                              kernel(params, isa::shared_memory());
                            }};
    return emulator::run(launch, settings);
  }
};

emulator::Settings schedule(unsigned seed) {
  emulator::Settings settings;
  settings.seed = seed;
  settings.asynchrony = static_cast<emulator::Asynchrony>(seed % 3);
  settings.schedule = emulator::Schedule::kByRank;
  return settings;
}

constexpr int kTiles[] = {1, 2, 4};  // per block

template <int kStages, int kEpilogueStages>
int check(unsigned schedules) {
  using P = Protocol<kStages, kEpilogueStages>;
  P::name_parts();
  for (const int tiles : kTiles) {
    for (unsigned seed = 0; seed < schedules; ++seed) {
      const int steps = 1 + static_cast<int>(seed) % (2 * kStages + 1);
      const std::string found = P::run(tiles, steps, schedule(seed));
      if (found.empty()) continue;
      std::printf("%d stages, %d of the epilogue, %d tiles of %d steps, seed %u: %s\n", kStages, kEpilogueStages, tiles,
                  steps, seed, found.c_str());
      return 1;
    }
  }
  return 0;
}

// Return 0 if, for each number of tiles, a schedule shows the fault and names its place. Some faults need two tiles.
int check_found(const char* name, Fault which, const std::string& place, bool by_one_tile = true) {
  constexpr unsigned kSchedules = 240;
  int missed = 0;
  fault = which;
  for (const int tiles : kTiles) {
    if (tiles == 1 && !by_one_tile) continue;
    std::string found;
    unsigned seed = 0;
    for (; found.empty() && seed < kSchedules; ++seed) found = Protocol<4, 4>::run(tiles, 5, schedule(seed));
    missed += found.find(place) == std::string::npos;
    std::printf("%s, %d tiles, after %u schedules: %s\n", name, tiles, seed, found.c_str());
  }
  fault = Fault::kNone;
  return missed;
}

}  // namespace

int main() {
  int faults = check<4, 1>(60) + check<2, 2>(60) + check<4, 4>(120);
  faults += check_found("release without wait", Fault::kReleaseWithoutWait, "the epilogue's empty stage");
  faults += check_found("commit without acquire", Fault::kCommitWithoutAcquire, "the epilogue's full stage", false);
  faults += check_found("state forgotten", Fault::kStateForgotten, "the epilogue's", false);
  faults += check_found("wrong first phase", Fault::kWrongFirstPhase, "the epilogue's empty stage");
  faults += check_found("no tail", Fault::kNoTail, "the mainloop's empty stage");
  faults += check_found("fewer bytes", Fault::kFewerBytes, "the mainloop's full stage");
  faults += check_found("bytes of A", Fault::kBytesOfA, "reads B of stage");
  return faults != 0;
}
