// sum_parts: add the sums that a product's parts left in its workspace, from the first part to the last, whatever order
// they came in. Then add the bias, and round once.
#include "eight_sm80.h"

namespace mft::cuda {
namespace {

// Each thread makes 8 neighbours.
struct SumPartsKernel {
  static constexpr int kThreads = 64, kBlocksPerMultiprocessor = 1;  // few: results are few
  struct Arguments {
    sm80::View out, bias;  // bias: one row, or no data
    const float* parts;    // (count, out.rows, stride)
    int64_t stride;
    int count;
  };

  MFT_DEVICE static void run(const Arguments& a) {
    const int eights = (a.out.columns + 7) / 8;
    const int64_t at = isa::block(0) * kThreads + isa::thread();
    const int row = static_cast<int>(at / eights), column = static_cast<int>(at % eights) * 8;
    if (row >= a.out.rows) return;
    float sum[8] = {};
    for (int part = 0; part < a.count; ++part) {
      sm80::add_eight(sum, a.parts + (static_cast<int64_t>(part) * a.out.rows + row) * a.stride + column);
    }
    if (a.bias.data != nullptr) {
      float bias[8];
      sm80::Eight::of(a.bias, 0, column).widen(bias, a.bias.type);
      for (int i = 0; i < 8; ++i) sum[i] += bias[i];
    }
    sm80::Eight::write(a.out, row, column, sum);
  }
};

}  // namespace

std::string sum_parts(const Product& p, int count, int64_t stride, const Device& device) {
  const Matrix bias{const_cast<void*>(p.bias), p.out.type, 1, p.out.columns, p.out.columns};
  LaunchShape shape;
  shape.x = sm80::tiles_of(p.out.rows * sm80::tiles_of(p.out.columns, 8), SumPartsKernel::kThreads);
  return isa::launch<SumPartsKernel>(
      shape, device.stream,
      {sm80::view_of(p.out), sm80::view_of(bias), static_cast<const float*>(p.workspace), stride, count});
}

}  // namespace mft::cuda
