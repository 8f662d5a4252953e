// Prints what product_sm90 chooses, a line each: MULTIPROCESSORS M P Q WORDS TRANSPOSED TOKENS, and the cycles that it
// expects of 64, 128 and 256 tokens a tile.
#include <cstdio>

#include "product_sm90.cuh"

using namespace mft::cuda;

template <MaskKind kMask, bool kTransposed>
void print(int multiprocessors, int64_t m, int64_t p, int64_t q) {
  Product product;
  product.out.rows = product.in.rows = m, product.out.columns = p, product.in.columns = q;
  const Device device{nullptr, multiprocessors, 90};
  std::printf("%d %d %d %d %d %d %d %.17g %.17g %.17g\n", multiprocessors, static_cast<int>(m), static_cast<int>(p),
              static_cast<int>(q), kMask == MaskKind::kWords, kTransposed,
              tokens_of_tile<BFloat16, kMask, kTransposed>(product, device),
              cycles_of_tile<ProductSm90<BFloat16, kMask, kTransposed, 64>, 64>(product, device),
              cycles_of_tile<ProductSm90<BFloat16, kMask, kTransposed, 128>, 128>(product, device),
              cycles_of_tile<ProductSm90<BFloat16, kMask, kTransposed, 256>, 256>(product, device));
}

int main() {
  const int64_t shapes[][2] = {{576, 1536}, {1024, 4096}, {4096, 4096}, {4096, 14336}, {14336, 4096}, {128256, 4096}};
  for (const int multiprocessors : {1, 78, 114, 132, 144}) {
    for (const auto& [p, q] : shapes) {
      for (const int64_t m : {1, 64, 65, 128, 129, 256, 500, 512, 1000, 1024, 2048, 4096, 100000}) {
        print<MaskKind::kMagnitude, false>(multiprocessors, m, p, q);
        print<MaskKind::kWords, false>(multiprocessors, m, p, q);
        print<MaskKind::kWords, true>(multiprocessors, m, p, q);
      }
    }
  }
}
