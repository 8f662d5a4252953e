// Prints how many stages product_sm80 takes, a line each: SHARED_BYTES STAGE_BYTES STAGES.
#include <cstdio>

#include "product_sm80.cuh"

using namespace mft::cuda;

template <class S, bool kTransposed, int kTokens>
void print(int shared_bytes) {
  constexpr int kStageBytes = sm80::ProductKernel<BFloat16, S, true, kTransposed, true, kTokens>::kStageBytes;
  std::printf("%d %d %d\n", shared_bytes, kStageBytes,
              sm80::stages_of(kStageBytes, {nullptr, 1, 80, shared_bytes}));
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
  }
}
