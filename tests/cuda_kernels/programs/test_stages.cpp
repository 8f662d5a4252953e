// Print how many stages product_sm80 and score_grad_sm80 take, one line each: SHARED_BYTES STAGE_BYTES STAGES.
#include <cstdio>

#include "product_sm80.cuh"
#include "score_grad_sm80.cuh"

using namespace mft::cuda;

template <class Kernel>
void print_of(int shared_bytes) {
  std::printf("%d %d %d\n", shared_bytes, Kernel::kStageBytes,
              sm80::stages_of(Kernel::kStageBytes, {nullptr, 1, 80, shared_bytes}));
}

template <class S, bool kTransposed, int kTokens>
void print(int shared_bytes) {
  print_of<sm80::ProductKernel<BFloat16, S, true, kTransposed, true, kTokens>>(shared_bytes);
}

template <class S>
void print(int shared_bytes) {
  print<S, false, 64>(shared_bytes);
  print<S, true, 64>(shared_bytes);
  print<S, false, 128>(shared_bytes);
  print<S, true, 128>(shared_bytes);
}

int main() {
  for (const int kib : {100, 164, 228}) {
    print<sm80::Words>(kib * 1024);
    print<BFloat16>(kib * 1024);
    print<float>(kib * 1024);
    print_of<sm80::ScoreGradKernel<BFloat16, true>>(kib * 1024);
  }
}
