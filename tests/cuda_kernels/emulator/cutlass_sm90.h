// CUTLASS's device code for sm_90 on the host: CUTLASS's own headers, with each single instruction replaced by the
// emulator's. Everything else in them is unchanged: pipelines and their states, the order of the load warps, the
// persistent scheduler, the mainloop's loads and waits, the kernel's loop over tiles.
//
//   replaced   mbarriers, named barriers and the fence before TMA (cutlass/arch/barrier.h), barriers and ranks of a
//              cluster (cute/arch/cluster_sm90.hpp), TMA's loads, stores and groups, stmatrix, wgmma of 64 x 256 x 16
//              from shared memory and its groups, addresses in shared memory
//   CUDA's     threadIdx, blockIdx, gridDim, __shfl_sync, __syncthreads, __syncwarp; the driver's function that
//              describes a tensor to TMA
//
// isa_sm90.h moves bytes and computes products as the descriptors say. But if a test names pieces of shared memory, TMA
// moves no bytes and wgmma computes no numbers: both report the piece that they touch. It is a fault to read a piece
// before all of it has arrived, or to write a piece while it is read. A function without emulation does nothing or
// stops in an assertion of CUTLASS.
//
// Include this file before any other header of CUTLASS. It includes each header with an instruction once, with the
// instruction's own definition renamed.
#pragma once

#define ENABLE_SM90_KERNEL_LEVEL 1  // as nvcc defines it for sm_90a: the kernel has a body

#include <cuda.h>
#include <cuda_runtime.h>

#include <cutlass/arch/wmma.h>  // empty, as long as no CUDA compiler is defined
#define __CUDACC_VER_MAJOR__ 13  // needed for the code that describes tensors to the driver
#define __CUDACC_VER_MINOR__ 0
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include <isa_sm90.h>  // csrc/cuda's, which includes the emulator's isa_sm90.h

// ------------------------------------------------------------------------------------------------------------ CUDA

namespace mft::cuda::emulator {

inline unsigned thread_index(int axis) { return axis == 0 ? static_cast<unsigned>(this_thread().index) : 0; }
inline unsigned block_index(int axis) { return static_cast<unsigned>(this_thread().block->index[axis]); }
inline unsigned grid_size(int axis) { return static_cast<unsigned>(current_launch().grid[axis]); }

template <unsigned (*kValue)(int)>
struct OfThread {
  template <int kAxis>
  struct Axis {
    operator unsigned() const { return kValue(kAxis); }
  };
  Axis<0> x;
  Axis<1> y;
  Axis<2> z;
  operator uint3() const { return {x, y, z}; }
};

}  // namespace mft::cuda::emulator

inline const mft::cuda::emulator::OfThread<mft::cuda::emulator::thread_index> threadIdx{};
inline const mft::cuda::emulator::OfThread<mft::cuda::emulator::block_index> blockIdx{};
inline const mft::cuda::emulator::OfThread<mft::cuda::emulator::grid_size> gridDim{};

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

// A piece that TMA fills as a whole, such as one operand of a stage. Tests define the pieces.
struct Piece {
  int64_t begin, bytes;  // within the shared memory of a block
  std::string name;
};
inline std::vector<Piece> pieces;

struct PieceUse {
  int64_t arrived = 0, coming = 0;  // bytes
  std::map<int, int> readers;       // warp -> number of its reads
};

// The reads of a warp, by groups; the last group is not yet committed.
struct WarpReads {
  std::vector<std::vector<const Piece*>> groups{1};
};

struct UseOfPieces {
  std::map<std::pair<int, const Piece*>, PieceUse> of;  // key: rank, piece
  std::map<std::pair<int, int>, WarpReads> reads;       // key: rank, warp
  std::map<std::pair<int, int>, int> committed, done;   // groups; keys: rank and thread, rank and warpgroup
};

inline const Piece& piece_at(int64_t offset) {
  for (const Piece& piece : pieces) {
    if (offset >= piece.begin && offset < piece.begin + piece.bytes) return piece;
  }
  fault("TMA or wgmma at shared offset " + std::to_string(offset) + ", where the test names no piece");
}

// Warps issue a wgmma; the first thread of each warp stands for its warp.
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

// Wait until all but the last `pending` groups of the warpgroup have read. No group reads before its four warps have
// issued it.
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

// Load `bytes` into the piece of each rank; they arrive later, at the barrier at the same offset in that block.
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
  if (p == nullptr) return 0;  // an epilogue without a source has a null pointer
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
inline void cluster_wait() { mft::cuda::isa::sync_cluster(); }  // cluster_wait arrives as well
inline void cluster_sync() { mft::cuda::isa::sync_cluster(); }
inline uint32_t block_rank_in_cluster() { return static_cast<uint32_t>(mft::cuda::isa::rank_in_cluster()); }
inline dim3 block_id_in_cluster() { return {block_rank_in_cluster(), 0, 0}; }
inline uint32_t elect_one_sync() { return mft::cuda::isa::lane() == 0; }
}  // namespace cute

#define prefetch_tma_descriptor prefetch_tma_descriptor_of_a_device
#define tma_store_arrive tma_store_arrive_of_a_device
#define tma_store_wait tma_store_wait_of_a_device
#define SM90_U32x4_STSM_N SM90_U32x4_STSM_N_of_a_device
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#undef prefetch_tma_descriptor
#undef tma_store_arrive
#undef tma_store_wait
#undef SM90_U32x4_STSM_N
namespace cute {

inline void prefetch_tma_descriptor(const TmaDescriptor*) {}
inline void tma_store_arrive() { mft::cuda::isa::commit_stores(); }
template <int kPending>
void tma_store_wait() {
  mft::cuda::isa::wait_stores_read<kPending>();
}

struct SM90_U32x4_STSM_N {
  using SRegisters = uint32_t[4];
  using DRegisters = uint128_t[1];
  static void copy(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint128_t& row) {
    mft::cuda::isa::detail::store_matrices<false>("stmatrix", &row, {a, b, c, d});
  }
};

namespace detail {

template <>
struct CallCOPY<SM90_TMA_STORE> {
  void operator()(const void* descriptor, const void* shared, int column, int row, int) const {
    if (mft::cuda::isa::lane() != 0) return;  // one instruction per warp, although all lanes call it
    mft::cuda::isa::store_tile(*static_cast<const mft::cuda::isa::TensorMap*>(descriptor), shared, column, row);
  }
};

}  // namespace detail
}  // namespace cute

#define warpgroup_arrive warpgroup_arrive_of_a_device
#define warpgroup_wait warpgroup_wait_of_a_device
#define warpgroup_commit_batch warpgroup_commit_batch_of_a_device
#include <cute/arch/mma_sm90_gmma.hpp>
#undef warpgroup_arrive
#undef warpgroup_wait
#undef warpgroup_commit_batch
namespace mft::cuda::emulator {

// Element (i, k) of an operand, in the layout of its descriptor, with i the faster index: atoms of 64 x 8, swizzled by
// the address.
inline uint16_t element_of(const char* block, uint64_t descriptor, int i, int k) {
  const auto bytes_at = [descriptor](int bit) { return static_cast<int64_t>(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1) fault("only the 128-byte swizzle is emulated");
  int64_t offset = bytes_at(0) + i / 64 * bytes_at(16) + k / 8 * bytes_at(32) + k % 8 * 128 + i % 64 * 2;
  offset ^= (offset >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, block + offset, 2);
  return bits;
}

template <class T>
void execute_shared(isa::detail::ProductOperation& operation, const char* block) {
  float a[64][16], b[16][256];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 64; ++i) a[i][k] = isa::widen(T{element_of(block, operation.a_descriptor, i, k)});
    for (int i = 0; i < 256; ++i) b[k][i] = isa::widen(T{element_of(block, operation.descriptor, i, k)});
  }
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < 128; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = operation.adds ? operation.d[t][i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      operation.d[t][i] = sum;
    }
  }
}

template <class T>
struct SharedProduct {
  using DRegisters = void;
  using ARegisters = uint64_t[1];
  using BRegisters = uint64_t[1];
  using CRegisters = float[128];
  struct Execute {
    template <class... Rest>
    void operator()(uint64_t a, uint64_t b, float& first, Rest&&... rest) const {
      static_assert(sizeof...(rest) == 128, "127 accumulators more, and whether they are added to");
      if (pieces.empty()) {
        const auto last = std::get<127>(std::forward_as_tuple(rest...));
        isa::detail::issue_product({256, b, &execute_shared<T>, a, last == cute::SM90::GMMA::ScaleOut::One}, &first,
                                   nullptr);
      } else {
        for (const uint64_t descriptor : {a, b}) read_piece(static_cast<int64_t>(descriptor & 0x3fff) << 4);
      }
    }
  };
  static constexpr Execute fma{};
};

}  // namespace mft::cuda::emulator
namespace cute {
inline void warpgroup_arrive() {
  mft::cuda::isa::sync_warp();
  mft::cuda::isa::begin_products();
}
template <int kPending>
void warpgroup_wait() {
  if (mft::cuda::emulator::pieces.empty()) {
    mft::cuda::isa::wait_products<kPending>();
  } else {
    mft::cuda::emulator::end_reads(kPending);
  }
}
inline void warpgroup_commit_batch() {
  if (mft::cuda::emulator::pieces.empty()) {
    mft::cuda::isa::commit_products();
  } else {
    mft::cuda::emulator::commit_reads();
  }
}

template <>
struct SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<SM90::GMMA::Major::MN, SM90::GMMA::Major::MN>
    : mft::cuda::emulator::SharedProduct<mft::cuda::BFloat16> {};
template <>
struct SM90::GMMA::MMA_64x256x16_F32F16F16_SS<SM90::GMMA::Major::MN, SM90::GMMA::Major::MN>
    : mft::cuda::emulator::SharedProduct<mft::cuda::Float16> {};
}  // namespace cute

#define ClusterBarrier ClusterBarrierOfADevice
#define ClusterTransactionBarrier ClusterTransactionBarrierOfADevice
#define NamedBarrier NamedBarrierOfADevice
#define fence_barrier_init fence_barrier_init_of_a_device
#define fence_view_async_shared fence_view_async_shared_of_a_device
#include <cutlass/arch/barrier.h>
#undef ClusterBarrier
#undef ClusterTransactionBarrier
#undef NamedBarrier
#undef fence_barrier_init
#undef fence_view_async_shared
namespace cutlass::arch {

inline void fence_barrier_init() { mft::cuda::isa::publish_barriers(); }
inline void fence_view_async_shared() { mft::cuda::isa::fence_shared_for_tma(); }

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
  void expect_transaction(uint32_t bytes) { expect_transaction(&barrier_, bytes); }
  static void expect_transaction(ValueType* barrier, uint32_t bytes) {
    mft::cuda::isa::expect(barrier, static_cast<int>(bytes));
  }
};

struct NamedBarrier : NamedBarrierOfADevice {
  using NamedBarrierOfADevice::NamedBarrierOfADevice;
  using NamedBarrierOfADevice::sync;
  static void sync(uint32_t threads, ReservedNamedBarriers barrier) {
    mft::cuda::isa::sync_threads(static_cast<int>(barrier), static_cast<int>(threads));
  }
};

}  // namespace cutlass::arch

#include <cutlass/arch/config.h>
#include <cutlass/detail/dependent_false.hpp>
#define NDEBUG  // else it stops with a trap if a warp does what is not its role
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

// Instead of the driver's encoding, write the arguments into the descriptor.
static_assert(sizeof(mft::cuda::isa::TensorMap) <= sizeof(CUtensorMap));
extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* descriptor, CUtensorMapDataType type, cuuint32_t rank,
                                                   void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                                   const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                                                   CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                                   CUtensorMapFloatOOBfill) {
  mft::cuda::isa::TensorMap map;
  const std::string refusal = mft::cuda::isa::make_tensor_map(
      &map, data, type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2, static_cast<int64_t>(sizes[1]),
      static_cast<int64_t>(sizes[0]), static_cast<int64_t>(strides[0]), static_cast<int>(box[1]),
      static_cast<int>(box[0]), mft::cuda::isa::Swizzle::k128);
  if (!refusal.empty() || rank != 3 || sizes[2] != 1 || box[2] != 1) return CUDA_ERROR_INVALID_VALUE;
  map.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 7 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 3 : 0;
  std::memcpy(static_cast<void*>(descriptor), &map, sizeof map);
  return CUDA_SUCCESS;
}

namespace mft::cuda::emulator {

inline void load_box(const void* descriptor, uint64_t* barrier, uint16_t ranks, void* shared, int column, int row) {
  const auto& map = *static_cast<const isa::TensorMap*>(descriptor);
  if (pieces.empty()) {
    isa::load_tile_multicast(map, barrier, ranks, shared, column, row);
  } else {
    load_piece(barrier, ranks, shared, static_cast<int64_t>(map.box_rows) * map.box_columns * map.bytes);
  }
}

}  // namespace mft::cuda::emulator
namespace cute::detail {

template <>
struct CallCOPY<SM90_TMA_LOAD_OP> {
  void operator()(const void* descriptor, uint64_t* barrier, uint64_t, void* shared, int column, int row, int) const {
    const auto rank = static_cast<uint16_t>(1u << block_rank_in_cluster());
    mft::cuda::emulator::load_box(descriptor, barrier, rank, shared, column, row);
  }
};

template <>
struct CallCOPY<SM90_TMA_LOAD_MULTICAST_OP> {
  void operator()(const void* descriptor, uint64_t* barrier, uint16_t ranks, uint64_t, void* shared, int column, int row,
                  int) const {
    mft::cuda::emulator::load_box(descriptor, barrier, ranks, shared, column, row);
  }
};

}  // namespace cute::detail
