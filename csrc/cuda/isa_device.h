// isa.h on a GPU: intrinsics, and inline PTX where CUDA has none.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch_device.h"

#define MFT_DEVICE __device__ __forceinline__

namespace mft::cuda::isa {

MFT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
MFT_DEVICE int lane() { return static_cast<int>(threadIdx.x) % 32; }
// The same in all lanes of a warp; the shuffle tells the compiler so.
MFT_DEVICE int warp() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }
MFT_DEVICE int64_t block(int axis) { return axis == 0 ? blockIdx.x : axis == 1 ? blockIdx.y : blockIdx.z; }
MFT_DEVICE int64_t blocks(int axis) { return axis == 0 ? gridDim.x : axis == 1 ? gridDim.y : gridDim.z; }

MFT_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

MFT_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ------------------------------------------------------------------------------------------------------ numbers

MFT_DEVICE float widen(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
MFT_DEVICE float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
MFT_DEVICE float widen(float value) { return value; }

template <class T>
MFT_DEVICE T round_to(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (__is_same(T, BFloat16)) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else {
    return {__half_as_ushort(__float2half_rn(value))};
  }
}

template <class T>
MFT_DEVICE uint32_t round_pair(float low, float high) {
  uint32_t pair;
  if constexpr (__is_same(T, BFloat16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

MFT_DEVICE float magnitude(float value) { return fabsf(value); }
MFT_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
MFT_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

// Return 0xffff in each half whose top bit is set, else 0. Selector digits 9 and b repeat the sign of bytes 1 and 3.
MFT_DEVICE uint32_t spread_signs(uint32_t pair) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(mask) : "r"(pair));
  return mask;
}

// The same: bit 15 of `low` decides the lower half, bit 31 of `high` the upper one. Digit f repeats the sign of byte 3
// of the second operand.
MFT_DEVICE uint32_t spread_signs(uint32_t low, uint32_t high) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %2, 0xff99;" : "=r"(mask) : "r"(low), "r"(high));
  return mask;
}

// --------------------------------------------------------------------------------------------- warps and blocks

MFT_DEVICE void sync_warp() { __syncwarp(); }
MFT_DEVICE void sync_block() { __syncthreads(); }

MFT_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <class T>
MFT_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

template <class T>
MFT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

MFT_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// ------------------------------------------------------------------------------------------------------- memory

// A word that a load returns. The emulator follows it from the load to its use.
using Register = uint32_t;

MFT_DEVICE void note_read(const void*) {}  // for the emulator, which notes reads of shared memory

template <class T>
MFT_DEVICE Register load_shared(const T* p) {
  return *p;
}

// The two 32-bit additions return the value before.
MFT_DEVICE uint32_t add_shared(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
MFT_DEVICE uint32_t add_global(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
MFT_DEVICE void add_global(int64_t* p, int64_t v) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}

MFT_DEVICE void fence_device() { __threadfence(); }

struct alignas(16) Words4 {
  uint32_t words[4];
};

// Load 16 bytes that nothing reads again soon.
MFT_DEVICE Words4 load_streaming(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(p));
  return v;
}

// Load a word that other blocks may just have written.
MFT_DEVICE uint32_t load_volatile(const uint32_t* p) { return *static_cast<const volatile uint32_t*>(p); }

// -------------------------------------------------------------------------------------------------------- sm_80

// Copy kBytes into shared memory, or zeros if not valid (then `global` is not read).
template <int kBytes>
MFT_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past L1, which would only hold a second copy
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

MFT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kPending of the committed groups are in flight.
template <int kPending>
MFT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Load four 8 x 8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r of matrix i. Each lane gets
// elements (lane / 4, 2 (lane % 4) + {0, 1}) of each matrix.
MFT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same for the transpose of each matrix: elements (2 (lane % 4) + {0, 1}, lane / 4).
MFT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16, 8) += a (16, 16) @ b (16, 8), fp32. With g = lane / 4 and c = 2 (lane % 4): a holds (g, c), (g + 8, c),
// (g, c + 8), (g + 8, c + 8) and their right neighbours; b (c, g) and (c + 8, g) and their lower neighbours;
// d (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1).
template <class T>
MFT_DEVICE void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, BFloat16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// -------------------------------------------------------------------------------------------------------- sm_90

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMostCluster = 1;
MFT_DEVICE int rank_in_cluster() { return 0; }
MFT_DEVICE void sync_cluster() { __trap(); }  // rather than results without the sums of the others
MFT_DEVICE float load_of_rank(const float* shared, int) { return *shared; }
#else
constexpr int kMostCluster = 8;  // blocks; some GPUs allow more on request

MFT_DEVICE int rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Called by whole warps. After it, all blocks of the cluster see what was written to shared memory before it.
MFT_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Load the same address from the shared memory of the block of that rank, which must not have ended.
MFT_DEVICE float load_of_rank(const float* shared, int rank) {
  float value;
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
      : "=f"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
}
#endif

// ---------------------------------------------------------------------------------------------------- launching

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerMultiprocessor)
    entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  Kernel::run(arguments);
}

// Launch on `stream` of the current device, without waiting. Return "" or an error text.
template <class Kernel>
std::string launch(const LaunchShape& shape, void* stream, const typename Kernel::Arguments& arguments) {
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(shape.x, shape.y, shape.z);
  configuration.blockDim = dim3(Kernel::kThreads);
  configuration.dynamicSmemBytes = shape.shared_bytes;
  configuration.stream = static_cast<cudaStream_t>(stream);
  return launch_entry<Kernel>(&entry<Kernel>, configuration, dim3(shape.cluster), arguments);
}

}  // namespace mft::cuda::isa
