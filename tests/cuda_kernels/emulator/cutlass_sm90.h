// CUTLASS's device code of sm_90 on the host: its own headers, in which what is one instruction gives way to the
// emulator's. Everything else that they define stays theirs: pipelines and their states, the order of the load warps,
// the persistent scheduler, the mainloop's loads and waits, the kernel's loop over tiles.
//
//   replaced   mbarriers (cutlass/arch/barrier.h), barriers and ranks of a cluster (cute/arch/cluster_sm90.hpp), TMA
//              loads, wgmma of bf16, 64 x 256 x 16, and its groups, addresses in shared memory
//   CUDA's     threadIdx, blockIdx, gridDim, __shfl_sync, __syncthreads, __syncwarp
//
// TMA moves no bytes here and wgmma makes no numbers: both tell of the piece of shared memory that they touch, and a
// piece that is read before all of it has come, or written while it is read, is a fault. What has no emulation yet,
// such as TMA stores and named barriers, does nothing or stops in an assertion of CUTLASS's.
//
// To be included before anything of CUTLASS: each header with an instruction is brought in by hand, once, with the
// instruction's own definition under another name.
#pragma once

#define ENABLE_SM90_KERNEL_LEVEL 1  // as nvcc for sm_90a: the kernel has a body

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include <isa_sm90.h>  // of csrc/cuda, which brings in the one beside this file

// ------------------------------------------------------------------------------------------------------------ CUDA

namespace mft::cuda::emulator {
inline uint3 thread_index() { return {static_cast<unsigned>(this_thread().index), 0, 0}; }
inline uint3 block_index() {
  const int64_t* index = this_thread().block->index;
  return {static_cast<unsigned>(index[0]), static_cast<unsigned>(index[1]), static_cast<unsigned>(index[2])};
}
inline dim3 grid_size() {
  const int64_t* grid = current_launch().grid;
  return {static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]), static_cast<unsigned>(grid[2])};
}
}  // namespace mft::cuda::emulator

#define threadIdx (::mft::cuda::emulator::thread_index())
#define blockIdx (::mft::cuda::emulator::block_index())
#define gridDim (::mft::cuda::emulator::grid_size())

inline void __syncthreads() { mft::cuda::isa::sync_block(); }
inline void __syncwarp(unsigned = 0) { mft::cuda::isa::sync_warp(); }
inline void __threadfence() {}
template <class T>
T __shfl_sync(unsigned, T value, int from, int = 32) {
  return mft::cuda::isa::shuffle(value, from);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) { return mft::cuda::isa::as_float(bits); }
namespace cutlass::arch {
inline int SmId() { return 0; }
}  // namespace cutlass::arch

// ----------------------------------------------------------------------------------- pieces of shared memory in use

namespace mft::cuda::emulator {

// A piece that TMA fills as a whole, such as one operand of a stage; where a test says that there is one.
struct Piece {
  int64_t begin, bytes;  // in the shared memory of a block
  std::string name;
};
inline std::vector<Piece> pieces;

struct PieceUse {
  int64_t arrived = 0, coming = 0;  // bytes
  std::map<int, int> readers;       // warps, and how often each reads
};

// What a warp reads, by groups; the last is not committed.
struct WarpReads {
  std::vector<std::vector<const Piece*>> groups{1};
};

struct UseOfPieces {
  std::map<std::pair<int, const Piece*>, PieceUse> of;  // by rank
  std::map<std::pair<int, int>, WarpReads> reads;       // rank, warp
  std::map<std::pair<int, int>, int> committed, done;   // groups: of rank, thread; of rank, warpgroup
};

inline const Piece& piece_at(int64_t offset) {
  for (const Piece& piece : pieces) {
    if (offset >= piece.begin && offset < piece.begin + piece.bytes) return piece;
  }
  fault("TMA or wgmma at shared offset " + std::to_string(offset) + ", where the test names no piece");
}

// wgmma is issued by warps: their first threads stand for them.
inline void read_piece(int64_t offset) {
  if (isa::lane() != 0) return;
  const int rank = this_thread().block->rank, warp = isa::warp();
  const Piece& piece = piece_at(offset);
  UseOfPieces& use = cluster_state<UseOfPieces>();
  PieceUse& state = use.of[{rank, &piece}];
  if (state.coming != 0 || state.arrived != piece.bytes) {
    const std::string reader = isa::detail::name_of_warp(rank, warp), bytes = std::to_string(state.arrived);
    fault(reader + " reads " + piece.name + " when " + bytes + " of its " + std::to_string(piece.bytes) +
          " bytes have come");
  }
  ++state.readers[warp];
  use.reads[{rank, warp}].groups.back().push_back(&piece);
}

inline void commit_reads() {
  const Thread& self = this_thread();
  UseOfPieces& use = cluster_state<UseOfPieces>();
  ++use.committed[{self.block->rank, self.index}];
  if (isa::lane() == 0) use.reads[{self.block->rank, isa::warp()}].groups.emplace_back();
}

// Until all but the last `pending` groups of the warpgroup have read: none does before its four warps have issued it.
inline void end_reads(int pending) {
  isa::sync_warp();  // .sync.aligned
  const Thread& self = this_thread();
  const int rank = self.block->rank, group = isa::warp() / 4;
  UseOfPieces& use = cluster_state<UseOfPieces>();
  const int due = use.committed[{rank, self.index}] - pending;
  const WarpReads* warps[4];
  for (int i = 0; i < 4; ++i) warps[i] = &use.reads[{rank, 4 * group + i}];
  const auto issued = [due](const WarpReads* reads) { return static_cast<int>(reads->groups.size()) > due; };
  wait_until([&] { return std::all_of(warps, warps + 4, issued); }, "the other warps' wgmma");
  for (int& done = use.done[{rank, group}]; done < due; ++done) {
    for (int i = 0; i < 4; ++i) {
      for (const Piece* piece : warps[i]->groups[static_cast<size_t>(done)]) {
        auto& readers = use.of[{rank, piece}].readers;
        const auto reader = readers.find(4 * group + i);
        if (--reader->second == 0) readers.erase(reader);
      }
    }
  }
}

// `bytes` of each rank's piece, which arrive some time later, with the barrier at the same place of that block.
inline void load_piece(uint64_t* barrier, unsigned ranks, void* shared, int64_t bytes) {
  const std::string from = isa::detail::name_of_warp(this_thread().block->rank, isa::warp());
  for (int rank = 0; rank < cluster_size(); ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    const char* mbarrier = isa::detail::at_rank(barrier, rank, 8, 8, "the barrier of a load");
    const Piece& piece = piece_at(shared_offset(shared, bytes, 128, "a load"));
    PieceUse& state = cluster_state<UseOfPieces>().of[{rank, &piece}];
    if (!state.readers.empty()) {
      const std::string reader = isa::detail::name_of_warp(rank, state.readers.begin()->first);
      fault(from + " loads into " + piece.name + ", which " + reader + " still reads");
    }
    if (state.arrived == piece.bytes) state.arrived = 0;
    if (state.arrived + state.coming + bytes > piece.bytes) {
      fault(from + " loads into " + piece.name + " of rank " + std::to_string(rank) + " twice");
    }
    state.coming += bytes;
    defer([=, &state, &owner = block_of_rank(rank), &hopper = isa::detail::state()] {
      state.coming -= bytes;
      state.arrived += bytes;
      isa::detail::BarrierState& arrived = isa::detail::barrier_of(hopper, mbarrier, owner);
      arrived.bytes -= bytes;
      isa::detail::complete_if_due(arrived);
    });
  }
}

}  // namespace mft::cuda::emulator

// -------------------------------------------------------- CuTe and CUTLASS up to their instructions, in this order

#include <cutlass/detail/helper_macros.hpp>
#define __CUDA_ARCH__ 900  // canonical_warp_idx_sync() and the like read threadIdx
#include <cutlass/cutlass.h>
#undef __CUDA_ARCH__

#define cast_smem_ptr_to_uint cast_smem_ptr_to_uint_of_a_device
#include <cute/arch/util.hpp>
#undef cast_smem_ptr_to_uint
namespace cute {
inline uint32_t cast_smem_ptr_to_uint(const void* p) {
  return static_cast<uint32_t>(mft::cuda::emulator::shared_offset(p, 1, 1, "an address in shared memory"));
}
}  // namespace cute

#define cluster_arrive_relaxed cluster_arrive_relaxed_of_a_device
#define cluster_arrive cluster_arrive_of_a_device
#define cluster_wait cluster_wait_of_a_device
#define cluster_sync cluster_sync_of_a_device
#define block_id_in_cluster block_id_in_cluster_of_a_device
#define block_rank_in_cluster block_rank_in_cluster_of_a_device
#define elect_one_sync elect_one_sync_of_a_device
#include <cute/arch/cluster_sm90.hpp>
#undef cluster_arrive_relaxed
#undef cluster_arrive
#undef cluster_wait
#undef cluster_sync
#undef block_id_in_cluster
#undef block_rank_in_cluster
#undef elect_one_sync
namespace cute {
inline void cluster_arrive_relaxed() {}
inline void cluster_arrive() {}
inline void cluster_wait() { mft::cuda::isa::sync_cluster(); }  // arrives as well
inline void cluster_sync() { mft::cuda::isa::sync_cluster(); }
inline uint32_t block_rank_in_cluster() { return static_cast<uint32_t>(mft::cuda::isa::rank_in_cluster()); }
inline dim3 block_id_in_cluster() { return {block_rank_in_cluster(), 0, 0}; }
inline uint32_t elect_one_sync() { return mft::cuda::isa::lane() == 0; }
}  // namespace cute

#define prefetch_tma_descriptor prefetch_tma_descriptor_of_a_device
#include <cute/arch/copy_sm90_desc.hpp>
#undef prefetch_tma_descriptor
namespace cute {
inline void prefetch_tma_descriptor(const TmaDescriptor*) {}
}  // namespace cute

#define warpgroup_arrive warpgroup_arrive_of_a_device
#define warpgroup_wait warpgroup_wait_of_a_device
#define warpgroup_commit_batch warpgroup_commit_batch_of_a_device
#include <cute/arch/mma_sm90_gmma.hpp>
#undef warpgroup_arrive
#undef warpgroup_wait
#undef warpgroup_commit_batch
namespace cute {
inline void warpgroup_arrive() { mft::cuda::isa::sync_warp(); }
template <int kPending>
void warpgroup_wait() {
  mft::cuda::emulator::end_reads(kPending);
}
inline void warpgroup_commit_batch() { mft::cuda::emulator::commit_reads(); }

template <>
struct SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<SM90::GMMA::Major::MN, SM90::GMMA::Major::MN> {
  using DRegisters = void;
  using ARegisters = uint64_t[1];
  using BRegisters = uint64_t[1];
  using CRegisters = float[128];
  struct Reads {
    template <class... Accumulators>
    void operator()(uint64_t a, uint64_t b, Accumulators&&...) const {
      for (const uint64_t descriptor : {a, b}) {
        mft::cuda::emulator::read_piece(static_cast<int64_t>(descriptor & 0x3fff) << 4);
      }
    }
  };
  static constexpr Reads fma{};
};
}  // namespace cute

#define ClusterBarrier ClusterBarrierOfADevice
#define ClusterTransactionBarrier ClusterTransactionBarrierOfADevice
#define fence_barrier_init fence_barrier_init_of_a_device
#include <cutlass/arch/barrier.h>
#undef ClusterBarrier
#undef ClusterTransactionBarrier
#undef fence_barrier_init
namespace cutlass::arch {

inline void fence_barrier_init() { mft::cuda::isa::publish_barriers(); }

struct ClusterBarrier {
  using ValueType = uint64_t;
  ClusterBarrier() = delete;

  void init(uint32_t arrivals) { mft::cuda::isa::init_barrier(&barrier_, static_cast<int>(arrivals)); }
  bool try_wait(uint32_t phase) { return mft::cuda::isa::try_wait(&barrier_, phase); }
  bool test_wait(uint32_t phase, uint32_t wanted = 1) { return wanted != 0 && try_wait(phase); }
  void wait(uint32_t phase) { mft::cuda::isa::wait(&barrier_, phase); }
  void arrive() { arrive(cute::block_rank_in_cluster()); }
  void arrive(uint32_t rank, uint32_t wanted = 1) {
    if (wanted != 0) mft::cuda::isa::arrive(&barrier_, static_cast<int>(rank));
  }

 protected:
  ValueType barrier_;
};

struct ClusterTransactionBarrier : ClusterBarrier {
  void arrive_and_expect_tx(uint32_t bytes) { mft::cuda::isa::arrive_expecting(&barrier_, static_cast<int>(bytes)); }
  void expect_transaction(uint32_t bytes) { mft::cuda::isa::expect(&barrier_, static_cast<int>(bytes)); }
};

}  // namespace cutlass::arch

#include <cutlass/arch/config.h>
#include <cutlass/detail/dependent_false.hpp>
#define NDEBUG  // else it stops with an instruction where a warp has not the role of what it does
#include <cutlass/pipeline/sm90_pipeline.hpp>
#undef NDEBUG

#include <cute/tensor.hpp>
#include <cutlass/fast_math.h>
#include <cutlass/gemm/kernel/tile_scheduler_params.h>
#include <cutlass/pipeline/pipeline.hpp>
#define __CUDA_ARCH__ 900  // its tile comes from blockIdx
#include <cutlass/gemm/kernel/static_tile_scheduler.hpp>
#undef __CUDA_ARCH__

#include <cute/atom/copy_traits_sm90_tma.hpp>
namespace mft::cuda::emulator {

// In place of what the driver writes into a descriptor: the bytes that one TMA instruction moves, one of `sharers` that
// fill each other's tiles.
template <class Op, class Bits, class Aux>
void describe_box(const cute::Copy_Traits<Op, Bits, Aux>& copy, int sharers) {
  auto* descriptor = const_cast<cute::TmaDescriptor*>(copy.get_tma_descriptor());
  *reinterpret_cast<int64_t*>(descriptor) = Bits::value / 8 / sharers;
}

inline int64_t bytes_of_box(const void* descriptor) { return *static_cast<const int64_t*>(descriptor); }

}  // namespace mft::cuda::emulator
namespace cute::detail {

template <>
struct CallCOPY<SM90_TMA_LOAD_OP> {
  template <class... Coordinates>
  void operator()(const void* descriptor, uint64_t* barrier, uint64_t, void* shared, const Coordinates&...) const {
    namespace emulator = mft::cuda::emulator;
    emulator::load_piece(barrier, 1u << block_rank_in_cluster(), shared, emulator::bytes_of_box(descriptor));
  }
};

template <>
struct CallCOPY<SM90_TMA_LOAD_MULTICAST_OP> {
  template <class... Coordinates>
  void operator()(const void* descriptor, uint64_t* barrier, uint16_t ranks, uint64_t, void* shared,
                  const Coordinates&...) const {
    mft::cuda::emulator::load_piece(barrier, ranks, shared, mft::cuda::emulator::bytes_of_box(descriptor));
  }
};

}  // namespace cute::detail
