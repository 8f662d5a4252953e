// Calls the functions of csrc/cuda/api.h so that every kernel is launched, on every GPU that has code for it.
//
// No kernel runs: cuda_runtime.cpp receives the launches. A compiled instance that nothing here launches is a fault in
// the report (cuda.py), so a new kernel, or a choice that can no longer happen, is noticed.
#include <cstdio>
#include <initializer_list>
#include <utility>

#include "api.h"

extern int capability;  // cuda_runtime.cpp

namespace mft::cuda {

// Weak: null if the build has left the file out.
__attribute__((weak)) std::string refusal_sm90(const Product&);
__attribute__((weak)) std::string refusal_sm90(const ScoreGrad&);
__attribute__((weak)) std::string product_sm90(const Product&, const Device&);
__attribute__((weak)) std::string score_grad_sm90(const ScoreGrad&, const Device&);

namespace {

constexpr int64_t kFeatures = 4096;
constexpr Type kTypes[] = {Type::kFloat32, Type::kBFloat16, Type::kFloat16};
constexpr Type kShortTypes[] = {Type::kBFloat16, Type::kFloat16};

char* const kMemory = reinterpret_cast<char*>(0x100000);  // address of tensors; nothing reads it

Device device;

Matrix matrix(Type type, int64_t rows, int64_t columns, bool aligned = true) {
  return {kMemory + (aligned ? 0 : bytes_of(type)), type, rows, columns, columns + (aligned ? 0 : 1)};
}

const uint32_t* words() { return reinterpret_cast<const uint32_t*>(kMemory); }

void check(const std::string& error) {
  if (!error.empty()) std::printf("error %d %s\n", capability, error.c_str());
}

template <class Problem>
bool hopper_takes(const Problem& problem) {
  std::string (*const refusal)(const Problem&) = refusal_sm90;
  return capability == 90 && refusal != nullptr && refusal(problem).empty();
}

void products(Product p, Type type, int64_t tokens, bool aligned) {
  p.weight = matrix(type, kFeatures, kFeatures, aligned);
  p.in = matrix(type, tokens, kFeatures, aligned);
  p.out = matrix(type, tokens, kFeatures, aligned);
  for (const bool transposed : {false, true}) {
    p.transposed = transposed;
    p.workspace = kMemory;
    check(product_general(p, device));
    if (takes_decode(p)) check(decode_sm80(p, device));
    if (hopper_takes(p)) check(product_sm90(p, device));
  }
}

void products() {
  for (const Type type : kShortTypes) {
    for (const bool aligned : {true, false}) {
      for (const int64_t tokens : {1, 16, 64, 100, 128, 256, 512, 1024, 2048, 4096}) {
        Product p;
        p.keep.words = words();
        products(p, type, tokens, aligned);
        for (const Type scores : kTypes) {
          for (const bool magnitude : {true, false}) {
            p.keep = {nullptr, matrix(scores, kFeatures, kFeatures, aligned), kMemory, 0, magnitude};
            products(p, type, tokens, aligned);
          }
        }
      }
    }
  }
}

void score_grads() {
  for (const Type type : kShortTypes) {
    for (const bool aligned : {true, false}) {
      for (const Type scores : kTypes) {
        for (const auto& [d_weight, features] :
             {std::pair{true, kFeatures}, {false, kFeatures}, {false, kFeatures / 8}}) {  // the last in parts
          ScoreGrad p;
          p.d_scores = matrix(scores, features, features, aligned);
          p.weight = matrix(type, features, features, aligned);
          if (d_weight) p.d_weight = p.weight;
          p.grad_output = p.x = matrix(type, 8192, features, aligned);
          p.sign.words = p.keep.words = words();
          p.workspace = kMemory;
          check(score_grad_sm80(p, device));
          if (hopper_takes(p)) check(score_grad_sm90(p, device));
        }
      }
    }
  }
}

void masks() {
  for (const Type type : kTypes) {
    const Matrix scores = matrix(type, kFeatures, kFeatures);
    auto* const bits = const_cast<uint32_t*>(words());
    for (const bool magnitude : {true, false}) {
      constexpr int64_t kCount = kFeatures * kFeatures;
      check(kept_threshold({kMemory, type, kCount, kCount / 2, magnitude, kMemory, kMemory}, device));
      check(pack_mask({bits, {nullptr, scores, kMemory, 0, magnitude}}, device));
    }
    check(pack_signs({bits, reinterpret_cast<int64_t*>(kMemory), scores}, device));
  }
}

}  // namespace
}  // namespace mft::cuda

int main() {
  for (const int each : {80, 86, 87, 89, 90, 100, 120}) {
    capability = each;
    const int kib = each == 80 || each == 87 ? 164 : each == 90 || each == 100 ? 228 : 100;  // cuda.py has them too
    mft::cuda::device = {nullptr, 132, each, kib * 1024};
    mft::cuda::products();
    mft::cuda::score_grads();
    mft::cuda::masks();
  }
}
