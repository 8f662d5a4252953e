// The emulator reports a fault if shared memory is written while it is read, and none once the reads have ended.
#include <cstdio>
#include <string>

#include "isa_sm90.h"

namespace mft::cuda {
namespace {

enum class Writes {
  kTmaAtOnce,
  kTmaAfterOtherRegisters,
  kTmaAfterArrival,
  kTmaAfterProduct,
  kCopyAtOnce,
  kCopyAfterBarrier
};

// A warp reads one of two stages, then writes into it. Four warps do so, as wgmma requires.
template <Writes kWrites>
struct Reader {
  static constexpr int kThreads = 128, kBlocksPerMultiprocessor = 1;
  static constexpr int kRows = 64, kBytes = kRows * 128;
  struct Arguments {
    isa::TensorMap map;
    const char* source;
  };

  static void run(const Arguments& a) {
    char* const stage = isa::shared_memory();
    auto* const barriers = reinterpret_cast<isa::TransactionBarrier*>(stage + 2 * kBytes);
    if (isa::thread() == 0) {
      for (int i = 0; i < 2; ++i) isa::init_barrier(barriers + i, i == 0 ? 1 : 4);
      isa::publish_barriers();
    }
    isa::sync_block();
    char* const row = stage + isa::warp() * 16 * 128 + isa::lane() % 16 * 128 + isa::lane() / 16 * 16;
    if constexpr (kWrites == Writes::kCopyAtOnce || kWrites == Writes::kCopyAfterBarrier) {
      uint32_t words[4];
      isa::load_matrices(words, row);
      if (kWrites == Writes::kCopyAfterBarrier) isa::sync_block();
      isa::copy_async<16>(row, a.source, true);
      isa::commit_copies();
      isa::wait_copies<0>();
      return;
    }
    isa::Register registers[1][4], others[1][4];
    isa::load_matrices(registers[0], row);
    isa::load_matrices(others[0], row + kBytes);
    isa::sync_warp();
    const auto& arrived = kWrites == Writes::kTmaAfterOtherRegisters ? others : registers;
    if (kWrites == Writes::kTmaAfterProduct) {
      float sums[32] = {};
      isa::begin_products();
      isa::product<BFloat16, 64>(sums, registers[0], isa::descriptor(stage + kBytes));
      isa::commit_products();
      isa::wait_products<0>();
    }
    if (kWrites == Writes::kTmaAtOnce || kWrites == Writes::kTmaAfterProduct) {
      if (isa::lane() == 0) isa::arrive(barriers + 1, 0);
    } else if (isa::lane() == 0) {
      isa::arrive_after(arrived, barriers + 1, 0);
    }
    if (isa::thread() == 0) {
      isa::wait(barriers + 1, 0);
      isa::arrive_expecting(barriers, kBytes);
      isa::load_tile(a.map, barriers, stage, 0, 0);
    }
    isa::wait(barriers, 0);
  }
};

template <Writes kWrites>
int check(const std::string& expected) {
  using Kernel = Reader<kWrites>;
  alignas(16) static char source[Kernel::kBytes];
  typename Kernel::Arguments a;
  a.source = source;
  std::string error = isa::make_tensor_map(&a.map, source, 2, Kernel::kRows, 64, 128, Kernel::kRows, 64,
                                          isa::Swizzle::k128);
  LaunchShape shape;
  shape.shared_bytes = 2 * Kernel::kBytes + 64;
  if (error.empty()) error = isa::launch<Kernel>(shape, nullptr, a);
  if (expected.empty() ? error.empty() : error.find(expected) != std::string::npos) return 0;
  std::printf("case %d: expected \"%s\", got \"%s\"\n", static_cast<int>(kWrites), expected.c_str(), error.c_str());
  return 1;
}

}  // namespace
}  // namespace mft::cuda

int main() {
  using namespace mft::cuda;
  return check<Writes::kTmaAtOnce>("still reads") + check<Writes::kTmaAfterOtherRegisters>("still reads") +
         check<Writes::kTmaAfterArrival>("") + check<Writes::kTmaAfterProduct>("") +
         check<Writes::kCopyAtOnce>("has read since its last barrier") + check<Writes::kCopyAfterBarrier>("");
}
