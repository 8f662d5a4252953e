// The instructions that kernels are written in: one short function each, in namespace mft::cuda::isa.
//
// nvcc takes them from isa_device.h. The tests put emulator/ on the include path instead, where the same functions run
// on the host. So the tests execute every kernel unchanged. Kernels use nothing else of CUDA, except d_scores on sm_90,
// which uses CUTLASS.
//
//   where      thread() block(axis) blocks(axis) lane() warp() shared_memory()
//   numbers    widen(T) round_to<T>(float) round_pair<T>(low, high) magnitude(float) as_bits(float) as_float(bits)
//              spread_signs(pair) spread_signs(low, high)
//   warps      sync_warp() shuffle(v, lane) shuffle_xor(v, mask) ballot(predicate)
//   blocks     sync_block() sync_threads(barrier, threads)
//   memory     Register load_shared(p) note_read(p) add_shared(p, v) add_global(p, v) fence_device()
//              load_streaming(p) load_volatile(p)
//   sm_80      copy_async<16 | 4>(shared, global, valid) commit_copies() wait_copies<N>()
//              load_matrices(r, row) load_matrices_transposed(r, row) multiply_16x8x16<T>(d, a, b0, b1)
//   sm_90      kMostCluster rank_in_cluster() sync_cluster() load_of_rank(p, rank); below sm_90, clusters of one block
//   launching  launch<Kernel>(shape, stream, arguments)
//
// A kernel is a struct: kThreads, kBlocksPerMultiprocessor, Arguments, and static void run(const Arguments&).
#pragma once

#include <cstdint>
#include <string>

#include "numbers.h"

namespace mft::cuda {

struct LaunchShape {
  int64_t x = 1, y = 1, z = 1;  // blocks
  int cluster = 1;              // blocks along x that run together
  int shared_bytes = 0;
};

}  // namespace mft::cuda

#ifdef __CUDACC__
#include "isa_device.h"
#else
#include "emulator/isa.h"
#endif
