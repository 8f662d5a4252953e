// The instructions of sm_90a: barriers in shared memory, TMA, wgmma. On a GPU they are CuTe's and CUTLASS's
// wrappers; in the tests the emulator's.
//
//   barriers   init_barrier(b, arrivals) publish_barriers() arrive(b, rank) arrive_after(registers, b, rank)
//              arrive_expecting(b, bytes) wait(b, parity)
//   TMA        TensorMap make_tensor_map(...) prefetch(map) load_tile(map, b, shared, column, row)
//              load_tile_multicast(map, b, ranks, shared, column, row) store_tile(map, shared, column, row)
//              commit_stores() wait_stores_read<N>() fence_shared_for_tma()
//   stmatrix   store_matrices_transposed(row, r)
//   wgmma      descriptor(shared) begin_products() product<T, N>(d, a, descriptor) commit_products()
//              wait_products<N>() fence_registers(d) claim_registers<N>() give_registers<N>()
#pragma once

#include "isa.h"

namespace mft::cuda::isa {

// The bits of the number of a 128-byte row that TMA XORs into the number of a 16-byte chunk, so that chunks of
// neighbouring rows lie in different banks.
enum class Swizzle : int { kNone = 0, k128 = 7 };

}  // namespace mft::cuda::isa

#ifdef __CUDACC__
#include "isa_sm90_device.h"
#else
#include "emulator/isa_sm90.h"
#endif
