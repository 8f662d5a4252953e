// Compare with CuTe where the device's instructions (isa_sm90_device.h) and tile_sm90.h place elements. Assembly does
// not run here. The code that makes descriptors and TMA's maps is ordinary C++, compiled here next to the emulator's.
#include <cstddef>

size_t __cvta_generic_to_shared(const void*);  // an offset in the emulator's shared memory
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
// As under nvcc, CuTe makes TMA's maps with a function of the driver, which is defined below.
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 4
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL

#include "layouts.h"

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <vector>

namespace mft::cuda::isa_of_the_device {
using Register = uint32_t;
using isa::Swizzle;
inline uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }
}  // namespace mft::cuda::isa_of_the_device
#define isa isa_of_the_device
#include "isa_sm90_device.h"
#undef isa

using namespace mft::cuda;
using namespace mft::cuda::layouts;
namespace gmma = cute::SM90::GMMA;
using cute::Int;

size_t __cvta_generic_to_shared(const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - isa::shared_memory());
}

namespace {

void check_swizzled() {
  run("swizzled", 32, 256 * kRowBytes, [] {
    if (isa::thread() != 0) return;
    char* shared = isa::shared_memory();
    const auto tile = swizzled_tile<BFloat16, 256>(shared);
    for (int row = 0; row < 256; ++row) {
      for (int column = 0; column < 64; ++column) {
        const auto expected = static_cast<int>(address_of(tile, row, column) - shared);
        expect("swizzled", 64 * row + column, swizzled(row, column / 8) + column % 8 * 2, expected);
      }
    }
  });
}

constexpr int kOffset = 3 * 1024;  // of a tile in shared memory

// product_sm90.cuh advances by sixteen columns for the next product.
template <class T, int kN, int kStep>
void expect_descriptor() {
  char* shared = isa::shared_memory() + kOffset;
  const auto columns = cute::local_tile(swizzled_tile<T, kN>(shared), cute::Shape<Int<kN>, Int<16>>{},
                                        cute::make_coord(Int<0>{}, Int<kStep>{}));
  const uint64_t expected = gmma::make_gmma_desc<gmma::Major::K>(columns), step = kStep * 32 >> 4;
  expect("the emulator's descriptor", kStep, isa::descriptor(shared) + step, expected);
  expect("the device's descriptor", kStep, isa_of_the_device::descriptor(shared) + step, expected);
}

template <class T, int kN>
void check_operands() {
  static_assert(std::is_base_of_v<Wgmma<T, kN>, isa_of_the_device::detail::Instruction<T, kN>>);
  run("descriptor", 32, kOffset + kN * kRowBytes, [] {
    if (isa::thread() != 0) return;
    expect_descriptor<T, kN, 0>();
    expect_descriptor<T, kN, 1>();
    expect_descriptor<T, kN, 2>();
    expect_descriptor<T, kN, 3>();
  });
}

// The arguments that the device passes to the driver, and those that CuTe passes for the same tile.
std::vector<std::vector<uint64_t>> tensor_maps;

template <class Element, class Layout>
void check_tensor_map(const Layout& box, isa::Swizzle swizzle) {
  constexpr int kRows = 300, kColumns = 100, kStride = 112;
  alignas(16) static Element data[kRows * kStride];
  CUtensorMap map;
  tensor_maps.clear();
  isa_of_the_device::make_tensor_map(&map, data, sizeof(Element), kRows, kColumns, kStride * sizeof(Element),
                                     cute::size<0>(box), cute::size<1>(box), swizzle);
  const auto rows = cute::make_layout(cute::make_shape(kRows, kColumns), cute::make_stride(kStride, Int<1>{}));
  cute::make_tma_copy(cute::SM90_TMA_LOAD{}, cute::make_tensor(cute::make_gmem_ptr(data), rows), box);
  if (tensor_maps.size() != 2 || tensor_maps[0].size() != tensor_maps[1].size()) {
    ++mistakes;
    std::printf("tensor maps: got %zu, expected 2 of one rank\n", tensor_maps.size());
    return;
  }
  for (size_t i = 0; i < tensor_maps[0].size(); ++i) {
    expect("a tensor map", static_cast<int>(i), tensor_maps[0][i], tensor_maps[1][i]);
  }
}

}  // namespace

// Ignored: the type (CuTe names bf16 where any 16-bit type would do) and the promotion to L2 do not affect where
// elements lie.
extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* data,
                                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill fill) {
  std::vector<uint64_t> map{rank,        reinterpret_cast<uint64_t>(data), uint64_t(interleave), uint64_t(swizzle),
                            uint64_t(fill)};
  map.insert(map.end(), sizes, sizes + rank);
  map.insert(map.end(), strides, strides + rank - 1);
  map.insert(map.end(), box, box + rank);
  map.insert(map.end(), steps, steps + rank);
  tensor_maps.push_back(map);
  return CUDA_SUCCESS;
}

// The device finds the driver's function with this one.
extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

int main() {
  check_swizzled();
  check_operands<BFloat16, 64>();
  check_operands<BFloat16, 128>();
  check_operands<BFloat16, 256>();
  check_operands<Float16, 64>();
  check_operands<Float16, 128>();
  check_operands<Float16, 256>();
  const gmma::Layout_K_SW128_Atom<cute::bfloat16_t> rows_of_8;
  check_tensor_map<cute::bfloat16_t>(cute::tile_to_shape(rows_of_8, cute::Shape<Int<256>, Int<64>>{}),
                                    isa::Swizzle::k128);
  check_tensor_map<uint32_t>(cute::Layout<cute::Shape<Int<128>, Int<4>>, cute::Stride<Int<4>, Int<1>>>{},
                             isa::Swizzle::kNone);
  std::printf("%d mistakes\n", mistakes);
  return mistakes != 0;
}
