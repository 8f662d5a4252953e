// Cases that score_grad_sm90 leaves to the general kernel. Each breaks one rule; the refusal names the rule and the
// value.
#include <cstdio>
#include <functional>

#include "api.h"

namespace mft::cuda {

std::string score_grad_sm90_bf16(const ScoreGrad&, const Device&) { return "bf16"; }
std::string score_grad_sm90_fp16(const ScoreGrad&, const Device&) { return "fp16"; }

}  // namespace mft::cuda

using namespace mft::cuda;

int main() {
  alignas(16) static char data[32];
  const auto matrix = [](int64_t rows, int64_t columns) { return Matrix{data, Type::kBFloat16, rows, columns, columns}; };
  const auto fitting = [&matrix] {
    ScoreGrad g;
    g.grad_output = matrix(5, 16), g.x = matrix(5, 24), g.weight = g.d_scores = g.sign.scores = matrix(16, 24);
    return g;
  };
  const std::pair<std::function<void(ScoreGrad&)>, const char*> cases[] = {
      {[](ScoreGrad&) {}, ""},
      {[](ScoreGrad& g) { g.d_scores.type = Type::kFloat32; }, ""},
      {[](ScoreGrad& g) { g.weight.type = Type::kFloat32; }, "weight must be bf16 or fp16, got fp32"},
      {[](ScoreGrad& g) { g.d_weight = g.weight; }, "d_weight must not be wanted"},
      {[](ScoreGrad& g) { g.d_scores.data = nullptr; }, "d_scores must be wanted"},
      {[](ScoreGrad& g) { g.d_scores.type = Type::kFloat16; }, "d_scores must be fp32 or of weight's type"},
      {[](ScoreGrad& g) { g.x.rows = 0; }, "tokens must be 1 to 2^30, got 0"},
      {[](ScoreGrad& g) { g.weight.rows = 12; }, "out_features must be 1 to 2^30 and a multiple of 8, got 12"},
      {[](ScoreGrad& g) { g.weight.columns = 20; }, "in_features must be 1 to 2^30 and a multiple of 8, got 20"},
      {[](ScoreGrad& g) { g.x.data = data + 2; }, "x must begin at a multiple of 16 bytes, got 2 bytes past one"},
      {[](ScoreGrad& g) { g.grad_output.stride = 17; }, "got a stride of 34 bytes"},
      {[](ScoreGrad& g) { g.weight.stride = 16; }, "weight's rows must not overlap"},
      {[](ScoreGrad& g) { g.weight.data = nullptr, g.weight.stride = 0; }, ""},
      {[](ScoreGrad& g) { g.weight.data = nullptr, g.weight.columns = 20; }, "in_features must be"},
      {[](ScoreGrad& g) { g.d_scores.stride = int64_t{1} << 40; }, "less than 2^40 bytes apart"},
      {[](ScoreGrad& g) { g.sign.scores.data = data + 4; }, "scores must begin at a multiple of 16 bytes"},
  };
  int failures = 0;
  for (const auto& [change, expected] : cases) {
    ScoreGrad g = fitting();
    change(g);
    const std::string got = refusal_sm90(g);
    const bool right = *expected == 0 ? got.empty() : got.find(expected) != std::string::npos;
    if (!right) std::printf("expected \"%s\", got \"%s\"\n", expected, got.c_str()), ++failures;
  }
  ScoreGrad g = fitting();
  if (score_grad_sm90(g, {}) != "bf16") std::puts("bf16 goes elsewhere"), ++failures;
  for (Matrix* m : {&g.weight, &g.x, &g.grad_output, &g.d_scores}) m->type = Type::kFloat16;
  if (score_grad_sm90(g, {}) != "fp16") std::puts("fp16 goes elsewhere"), ++failures;
  return failures != 0;
}
