#include "dequantize.h"

#include <algorithm>

#include "parallel.h"

namespace mft {

void dequantize(const Capability& cpu, const Matrix& out, const Quantized& weight) {
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(out.columns, 1));
  parallel_for(0, out.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) cpu.decode(out.row(r), out.format, weight, r, 0, out.columns);
  });
}

}  // namespace mft
