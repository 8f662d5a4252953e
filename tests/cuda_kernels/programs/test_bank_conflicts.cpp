// Every ldmatrix and stmatrix of the matrix kernels moves 8 rows of 16 bytes at a time. The rows must lie in 8
// different groups of 4 banks, or the instruction takes longer.
//
// The kernels run unchanged, from the library's objects. This file checks the addresses that the lanes pass to each
// instruction.
#define collective collective_of_the_machine
#include "emulator/machine.cpp"
#undef collective

#include <cstdio>
#include <map>

#include "api.h"

using namespace mft::cuda;

namespace {

int mistakes = 0;
std::map<std::string, int> executed;  // counts of one launch

void mistake(const std::string& text) {
  if (++mistakes <= 10) std::printf("%s\n", text.c_str());
}

// Each input begins with the address of the lane's row.
void look_at_banks(const std::string& operation, const void* const* inputs) {
  ++executed[operation];
  const char* shared = emulator::this_thread().block->shared;
  for (int first = 0; first < 32; first += 8) {
    unsigned groups = 0;
    for (int lane = first; lane < first + 8; ++lane) {
      groups |= 1u << ((*static_cast<const char* const*>(inputs[lane]) - shared) / 16 % 8);
    }
    if (groups != 0xff) {
      mistake(operation + ", lanes " + std::to_string(first) + " on: only " +
              std::to_string(__builtin_popcount(groups)) + " of 8 bank groups");
    }
  }
}

}  // namespace

namespace mft::cuda::emulator {

void collective(const char* operation, const void* input, void* output,
                const std::function<void(const void* const*, void* const*)>& compute) {
  collective_of_the_machine(operation, input, output, [&](const void* const* inputs, void* const* outputs) {
    if (std::strstr(operation, "_matrices") != nullptr) look_at_banks(operation, inputs);
    compute(inputs, outputs);
  });
}

}  // namespace mft::cuda::emulator

namespace {

constexpr int kFeatures = 256, kInputs = 256, kMostTokens = 160;
constexpr Device kDevice{nullptr, 2, 80};

alignas(16) char memory[6][kFeatures * kInputs * 4];  // zeros

Matrix matrix(int which, Type type, int rows, int columns) { return {memory[which], type, rows, columns, columns}; }

void expect(const std::string& launch, const std::string& fault, const std::vector<std::string>& operations) {
  if (!fault.empty()) mistake(launch + ": " + fault);
  for (const std::string& operation : operations) {
    if (executed[operation] == 0) mistake(launch + " executes no " + operation);
  }
  executed.clear();
}

// 40, 80 and 160 tokens take tiles of 64, 128 and 256 on sm_90.
void check_products(Type type, bool transposed, bool packed, int tokens) {
  Product p;
  p.transposed = transposed;
  p.weight = matrix(0, type, kFeatures, kInputs);
  p.in = matrix(1, type, tokens, transposed ? kFeatures : kInputs);
  p.out = matrix(2, type, tokens, transposed ? kInputs : kFeatures);
  if (packed) p.keep.words = reinterpret_cast<const uint32_t*>(memory[3]);
  p.keep.scores = matrix(3, type, kFeatures, kInputs);
  p.keep.threshold = memory[4];
  const std::string name = "product" + std::string(transposed ? ", transposed" : "") + (packed ? ", packed" : "");
  const std::string load = transposed ? "load_matrices_transposed" : "load_matrices";
  expect(name + " on sm_90", product_sm90(p, kDevice), {load, "store_matrices_transposed"});
  expect(name + " on sm_80", product_general(p, kDevice), {load});
}

void check_score_grad(Type type) {
  ScoreGrad s;
  s.weight = matrix(0, type, kFeatures, kInputs);
  s.x = matrix(1, type, kMostTokens, kInputs);
  s.grad_output = matrix(2, type, kMostTokens, kFeatures);
  s.d_scores = matrix(3, Type::kFloat32, kFeatures, kInputs);
  expect("score_grad on sm_80", score_grad_sm80(s, kDevice), {"load_matrices_transposed"});
}

}  // namespace

int main() {
  for (const Type type : {Type::kBFloat16, Type::kFloat16}) {
    for (const bool transposed : {false, true}) {
      for (const bool packed : {false, true}) {
        for (const int tokens : {40, 80, kMostTokens}) check_products(type, transposed, packed, tokens);
      }
    }
    check_score_grad(type);
  }
  std::printf("%d mistakes\n", mistakes);
  return mistakes != 0;
}
