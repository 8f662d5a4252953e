// Code that the comparisons with CuTe share: a swizzled tile as CuTe addresses it, and the report of a difference.
#pragma once

#include <cute/tensor.hpp>  // before CuTe's other headers, which need it

#include <cstdio>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "isa_sm90.h"
#include "tile_sm90.h"

namespace mft::cuda::layouts {

inline int mistakes = 0;

template <class Value>
void expect(const char* what, int place, Value got, Value expected) {
  if (got == expected || ++mistakes > 20) return;
  std::printf("%s, %d: got %lld, expected %lld\n", what, place, static_cast<long long>(got),
              static_cast<long long>(expected));
}

inline void run(const char* what, int threads, int shared_bytes, const std::function<void()>& body) {
  const std::string fault = emulator::run({{1, 1, 1}, 1, threads, shared_bytes, body}, {});
  if (fault.empty()) return;
  ++mistakes;
  std::printf("%s: %s\n", what, fault.c_str());
}

template <class T>
using CuteElement = std::conditional_t<std::is_same_v<T, BFloat16>, cute::bfloat16_t, cute::half_t>;

// The wgmma that CuTe chooses for 64 x kN sums, with the first operand in registers and the rows of both along the
// depth.
template <class T, int kN>
using Wgmma = decltype(cute::SM90::GMMA::rs_op_selector<CuteElement<T>, CuteElement<T>, float,
                                                        cute::Shape<cute::_64, cute::Int<kN>, cute::_16>>());

// A tile in shared memory with 128-byte rows, in the 128-byte swizzle of wgmma and TMA.
template <class T, int kRows>
auto swizzled_tile(char* shared) {
  using Element = CuteElement<T>;
  const cute::SM90::GMMA::Layout_K_SW128_Atom<Element> rows_of_8;
  const auto layout = cute::tile_to_shape(rows_of_8, cute::Shape<cute::Int<kRows>, cute::_64>{});
  return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(shared)), layout);
}

template <class Tensor>
char* address_of(const Tensor& tile, int row, int column) {
  return const_cast<char*>(reinterpret_cast<const char*>(&tile(row, column)));
}

}  // namespace mft::cuda::layouts
