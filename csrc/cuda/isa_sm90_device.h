// isa_sm90.h on a GPU.
#pragma once

#include <cuda.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <utility>

namespace mft::cuda::isa {

// -------------------------------------------------------------------------------------------------------- barriers

using TransactionBarrier = uint64_t;

MFT_DEVICE void init_barrier(TransactionBarrier* b, int arrivals) {
  cutlass::arch::ClusterBarrier::init(b, static_cast<uint32_t>(arrivals));
}

// Called after init_barrier and before sync_cluster, so that TMA and the other block see the barrier.
MFT_DEVICE void publish_barriers() { cutlass::arch::fence_barrier_init(); }

// Arrive at the barrier with the same offset in the block of that rank.
MFT_DEVICE void arrive(TransactionBarrier* b, int rank) {
  cutlass::arch::ClusterBarrier::arrive(b, static_cast<uint32_t>(rank), 1u);
}

// The same, called by the first lane of a warp, once the registers are loaded. ptxas would move arithmetic behind an
// arrival, and with it the wait for loads. So the address depends on the registers, through bits that are 0 in this
// lane; ptxas does not know that they are.
template <int kRows, int kColumns>
MFT_DEVICE void arrive_after(const Register (&registers)[kRows][kColumns], TransactionBarrier* b, int rank) {
  uint32_t any = 0, lower_lanes;
#pragma unroll
  for (int i = 0; i < kRows * kColumns; ++i) any |= registers[i / kColumns][i % kColumns];
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lower_lanes));
  arrive(b + (any & lower_lanes), rank);
}

MFT_DEVICE void arrive_expecting(TransactionBarrier* b, int bytes) {
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(b, static_cast<uint32_t>(bytes));
}

// Wait until the phase of that parity is over.
MFT_DEVICE void wait(TransactionBarrier* b, uint32_t parity) { cutlass::arch::ClusterBarrier::wait(b, parity); }

// ----------------------------------------------------------------------------------------------------------- TMA

using TensorMap = CUtensorMap;

// Make a map of rows of 2- or 4-byte elements, in boxes (box_rows, box_columns). Elements outside the matrix read as 0
// and are not written. Rows of a swizzled box have 128 bytes, and the 16-byte chunk c of row r lies at c ^ (r % 8).
// Return "" or an error text.
inline std::string make_tensor_map(TensorMap* map, const void* data, int bytes, int64_t rows, int64_t columns,
                                   int64_t row_bytes, int box_rows, int box_columns, Swizzle swizzle) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                                cudaEnableDefault, &found);
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled; CUDA 12 is needed";
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUtensorMapDataType type = bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  const CUtensorMapSwizzle pattern =
      swizzle == Swizzle::k128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, pattern, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? "" : "cuTensorMapEncodeTiled failed with " + std::to_string(result);
}

MFT_DEVICE void prefetch(const TensorMap& map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
}

// Load a tile. Its bytes arrive at b of this block.
MFT_DEVICE void load_tile(const TensorMap& map, TransactionBarrier* b, void* shared, int column, int row) {
  cute::SM90_TMA_LOAD_2D::copy(&map, b, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), shared, column,
                               row);
}

// Load into every block whose rank is a bit of `ranks`, at the same offset. The bytes arrive at that block's barrier.
MFT_DEVICE void load_tile_multicast(const TensorMap& map, TransactionBarrier* b, uint16_t ranks, void* shared,
                                    int column, int row) {
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(
      &map, b, ranks, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), shared, column, row);
}

MFT_DEVICE void store_tile(const TensorMap& map, const void* shared, int column, int row) {
  cute::SM90_TMA_STORE_2D::copy(&map, shared, column, row);
}

MFT_DEVICE void commit_stores() { cute::tma_store_arrive(); }

// Wait until all but kPending groups have read their shared memory.
template <int kPending>
MFT_DEVICE void wait_stores_read() {
  cute::tma_store_wait<kPending>();
}

// Make earlier ordinary writes to shared memory visible to later TMA operations.
MFT_DEVICE void fence_shared_for_tma() { cute::tma_store_fence(); }

// Writes four 8 x 8 matrices of 16-bit elements, transposed: lane 8 i + r gives the address of row r of matrix i.
MFT_DEVICE void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
  cute::SM90_U16x8_STSM_T::copy(r[0], r[1], r[2], r[3], *static_cast<cute::uint128_t*>(row));
}

// --------------------------------------------------------------------------------------------------------- wgmma

// Return the descriptor of a tile with rows of 128 bytes, swizzled as by TMA, whose groups of 8 rows follow each other.
MFT_DEVICE uint64_t descriptor(const void* shared) {
  cute::GmmaDescriptor d;
  d.desc_ = 0;
  d.bitfield.start_address_ = static_cast<uint16_t>(shared_address(shared) >> 4);
  d.bitfield.leading_byte_offset_ = 1;  // not read in this layout
  d.bitfield.stride_byte_offset_ = 1024 >> 4;
  d.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
  return d.desc_;
}

template <class Value, int kCount>
MFT_DEVICE void fence_registers(Value (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(values[i]);
}

// Called before the first product after a write to registers that it reads or adds to.
MFT_DEVICE void begin_products() { cute::warpgroup_arrive(); }
MFT_DEVICE void commit_products() { cute::warpgroup_commit_batch(); }

// Wait until at most kPending of the committed groups are in flight.
template <int kPending>
MFT_DEVICE void wait_products() {
  cute::warpgroup_wait<kPending>();
}

namespace detail {

namespace gmma = cute::SM90::GMMA;

template <class T, int kN>
struct Instruction;
template <>
struct Instruction<BFloat16, 256> : gmma::MMA_64x256x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Instruction<BFloat16, 128> : gmma::MMA_64x128x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Instruction<BFloat16, 64> : gmma::MMA_64x64x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Instruction<Float16, 256> : gmma::MMA_64x256x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Instruction<Float16, 128> : gmma::MMA_64x128x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Instruction<Float16, 64> : gmma::MMA_64x64x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K> {};

template <class T, int kN, size_t... kIndex>
MFT_DEVICE void product(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, std::index_sequence<kIndex...>) {
  Instruction<T, kN>::fma(a[0], a[1], a[2], a[3], b, d[kIndex]..., gmma::ScaleOut::One);
}

}  // namespace detail

// d (64, N) += a (64, 16) @ b (N, 16).T by the four warps of a warpgroup, asynchronously: nothing else may use d and a
// until a wait. Warp w holds rows 16 w to 16 w + 15 of a and d, laid out as in multiply_16x8x16; d[4 j ...] are columns
// 8 j on.
template <class T, int kN>
MFT_DEVICE void product(float (&d)[kN / 2], const Register (&a)[4], uint64_t b) {
  detail::product<T, kN>(d, a, b, std::make_index_sequence<kN / 2>());
}

// Move registers between warpgroups: from here on, each thread has kCount. All warps of the warpgroup call it.
template <int kCount>
MFT_DEVICE void claim_registers() {
  cutlass::arch::warpgroup_reg_alloc<kCount>();
}

template <int kCount>
MFT_DEVICE void give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kCount>();
}

}  // namespace mft::cuda::isa
