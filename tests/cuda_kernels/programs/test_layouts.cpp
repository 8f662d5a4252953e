// Compare the emulator's instructions with CuTe's tables, which independently say where each element lies. Elements are
// their own numbers, or small integers with exact sums.
#include "layouts.h"

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

using namespace mft::cuda;
using namespace mft::cuda::layouts;

namespace {

// An arbitrary integer from -8 to 8.
int small(int i, int j, int matrix) {
  return static_cast<int>((static_cast<uint32_t>(i * 977 + j * 31 + matrix * 7919 + 1) * 2654435761u >> 16) % 17) - 8;
}

template <class T>
uint16_t bits_of(int value) {
  return isa::round_to<T>(static_cast<float>(value)).bits;
}

void put(char* place, uint16_t element) { std::memcpy(place, &element, 2); }

uint16_t element_at(const char* place) {
  uint16_t element;
  std::memcpy(&element, place, 2);
  return element;
}

// ------------------------------------------------------------------------------------------- ldmatrix and stmatrix

// Rows lie in a different order from lanes. CuTe's layouts map (lane, bit) to a bit of all four matrices.
char* row_of_lane() { return isa::shared_memory() + isa::lane() * 7 % 32 * 16; }

template <class Operation>
void check_load(const char* what, void (*load)(uint32_t (&)[4], const void*)) {
  const typename cute::Copy_Traits<Operation>::SrcLayout memory;
  const typename cute::Copy_Traits<Operation>::DstLayout registers;
  run(what, 32, 512, [&] {
    const int lane = isa::lane();
    for (int i = 0; i < 8; ++i) put(row_of_lane() + 2 * i, static_cast<uint16_t>(memory(lane, 16 * i) / 16));
    isa::sync_warp();
    uint32_t r[4];
    load(r, row_of_lane());
    for (int i = 0; i < 8; ++i) {
      expect<int>(what, 8 * lane + i, r[i / 2] >> 16 * (i % 2) & 0xffff, registers(lane, 16 * i) / 16);
    }
  });
}

void check_store() {
  const char* what = "store_matrices_transposed";
  const cute::Copy_Traits<cute::SM90_U16x8_STSM_T>::SrcLayout registers;
  const cute::Copy_Traits<cute::SM90_U16x8_STSM_T>::DstLayout memory;
  run(what, 32, 512, [&] {
    const int lane = isa::lane();
    uint32_t r[4] = {};
    for (int i = 0; i < 8; ++i) r[i / 2] |= static_cast<uint32_t>(registers(lane, 16 * i) / 16) << 16 * (i % 2);
    isa::store_matrices_transposed(row_of_lane(), r);
    isa::sync_warp();
    for (int i = 0; i < 8; ++i) {
      expect<int>(what, 8 * lane + i, element_at(row_of_lane() + 2 * i), memory(lane, 16 * i) / 16);
    }
  });
}

// -------------------------------------------------------------------------------------------------------- products

// Fill this thread's registers with its elements of a matrix, from column `first` on. CuTe's layouts map (thread,
// value) to row + rows * column.
template <class T, class Layout>
void fill(uint32_t* registers, const Layout& layout, int rows, int matrix, int first = 0) {
  for (int i = 0; i < cute::size<1>(layout); ++i) {
    const int place = layout(isa::thread(), i);
    const uint32_t element = bits_of<T>(small(place % rows, first + place / rows, matrix));
    registers[i / 2] = (i % 2 == 0 ? 0 : registers[i / 2]) | element << 16 * (i % 2);
  }
}

template <class Layout>
void fill_sums(float* d, const Layout& layout, int rows) {
  for (int i = 0; i < cute::size<1>(layout); ++i) {
    const int place = layout(isa::thread(), i);
    d[i] = static_cast<float>(small(place % rows, place / rows, 2));
  }
}

// d = matrix 2 + matrix 0 @ matrix 1.T
template <class Layout>
void expect_sums(const char* what, const float* d, const Layout& layout, int rows, int depth) {
  for (int i = 0; i < cute::size<1>(layout); ++i) {
    const int place = layout(isa::thread(), i), m = place % rows, n = place / rows;
    int sum = small(m, n, 2);
    for (int k = 0; k < depth; ++k) sum += small(m, k, 0) * small(n, k, 1);
    expect(what, place, d[i], static_cast<float>(sum));
  }
}

template <class T, class Operation>
void check_multiply(const char* what) {
  using Traits = cute::MMA_Traits<Operation>;
  run(what, 32, 0, [&] {
    uint32_t a[4], b[2];
    float d[4];
    fill<T>(a, typename Traits::ALayout{}, 16, 0);
    fill<T>(b, typename Traits::BLayout{}, 8, 1);
    fill_sums(d, typename Traits::CLayout{}, 16);
    isa::multiply_16x8x16<T>(d, a, b[0], b[1]);
    expect_sums(what, d, typename Traits::CLayout{}, 16, 16);
  });
}

constexpr int kOffset = 3 * 1024;  // of a tile in shared memory

// One step of product_sm90.cuh: four products.
template <class T, int kN>
void check_product(const char* what) {
  using Traits = cute::MMA_Traits<Wgmma<T, kN>>;
  run(what, 128, kOffset + kN * kRowBytes, [&] {
    char* shared = isa::shared_memory() + kOffset;
    const auto tile = swizzled_tile<T, kN>(shared);
    for (int n = isa::thread(); n < kN; n += 128) {
      for (int k = 0; k < 64; ++k) put(address_of(tile, n, k), bits_of<T>(small(n, k, 1)));
    }
    isa::sync_block();
    isa::Register a[4][4];
    float d[kN / 2];
    fill_sums(d, typename Traits::CLayout{}, 64);
    isa::begin_products();
    for (int i = 0; i < 4; ++i) {
      uint32_t words[4];
      fill<T>(words, typename Traits::ALayout{}, 64, 0, 16 * i);
      for (int j = 0; j < 4; ++j) a[i][j] = words[j];
      isa::product<T, kN>(d, a[i], isa::descriptor(shared) + (i * 32 >> 4));
    }
    isa::commit_products();
    isa::wait_products<0>();
    expect_sums(what, d, typename Traits::CLayout{}, 64, 64);
  });
}

// ------------------------------------------------------------------------------------------------------------- TMA

// Load and store a box that extends beyond the matrix's lower right corner.
void check_tma() {
  constexpr int kRows = 300, kColumns = 100, kStride = 104, kRow = 60, kColumn = 56;
  constexpr int kBarrier = kOffset + 256 * kRowBytes;
  alignas(16) static uint16_t from[kRows * kStride], to[kRows * kStride];
  for (int i = 0; i < kRows * kStride; ++i) from[i] = static_cast<uint16_t>(i + 1);
  isa::TensorMap source, target;
  const auto map = [](isa::TensorMap* m, void* data) {
    return isa::make_tensor_map(m, data, 2, kRows, kColumns, 2 * kStride, 256, 64, isa::Swizzle::k128);
  };
  if (!map(&source, from).empty() || !map(&target, to).empty()) ++mistakes;
  const auto loaded = [](int r, int c) {
    return r + kRow < kRows && c + kColumn < kColumns ? from[(r + kRow) * kStride + c + kColumn] : uint16_t{0};
  };
  run("TMA", 32, kBarrier + 8, [&] {
    char* shared = isa::shared_memory() + kOffset;
    const auto tile = swizzled_tile<BFloat16, 256>(shared);
    auto* barrier = reinterpret_cast<isa::TransactionBarrier*>(isa::shared_memory() + kBarrier);
    if (isa::thread() == 0) {
      isa::init_barrier(barrier, 1);
      isa::publish_barriers();
      isa::arrive_expecting(barrier, 256 * kRowBytes);
      isa::load_tile(source, barrier, shared, kColumn, kRow);
    }
    isa::sync_block();
    isa::wait(barrier, 0);
    for (int i = isa::thread(); i < 256 * 64; i += 32) {
      expect("load_tile", i, element_at(address_of(tile, i / 64, i % 64)), loaded(i / 64, i % 64));
      put(address_of(tile, i / 64, i % 64), static_cast<uint16_t>(40000 + i));
    }
    isa::fence_shared_for_tma();
    isa::sync_block();
    if (isa::thread() == 0) {
      isa::store_tile(target, shared, kColumn, kRow);
      isa::commit_stores();
      isa::wait_stores_read<0>();
    }
    isa::sync_block();
  });
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kStride; ++c) {
      const bool inside = r >= kRow && r < kRow + 256 && c >= kColumn && c < kColumns;
      const int expected = inside ? 40000 + (r - kRow) * 64 + c - kColumn : 0;
      expect<int>("store_tile", r * kStride + c, to[r * kStride + c], expected);
    }
  }
}

}  // namespace

int main() {
  check_load<cute::SM75_U32x4_LDSM_N>("load_matrices", isa::load_matrices);
  check_load<cute::SM75_U16x8_LDSM_T>("load_matrices_transposed", isa::load_matrices_transposed);
  check_store();
  check_multiply<BFloat16, cute::SM80_16x8x16_F32BF16BF16F32_TN>("multiply_16x8x16<BFloat16>");
  check_multiply<Float16, cute::SM80_16x8x16_F32F16F16F32_TN>("multiply_16x8x16<Float16>");
  check_product<BFloat16, 64>("product<BFloat16, 64>");
  check_product<BFloat16, 128>("product<BFloat16, 128>");
  check_product<BFloat16, 256>("product<BFloat16, 256>");
  check_product<Float16, 64>("product<Float16, 64>");
  check_product<Float16, 128>("product<Float16, 128>");
  check_product<Float16, 256>("product<Float16, 256>");
  check_tma();
  std::printf("%d mistakes\n", mistakes);
  return mistakes != 0;
}
