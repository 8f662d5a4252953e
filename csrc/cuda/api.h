// The interface between the bindings and the kernels: plain structs and pointers, without torch and CuTe.
//
// M tokens, N out_features, K in_features; weight, scores and masks are (N, K). Pointers are on the device, except in
// the tests, where the kernels run in an emulator on the host. Nothing here waits for the device.
#pragma once

#include <cstdint>
#include <string>

namespace mft::cuda {

enum class Type : int { kFloat32, kBFloat16, kFloat16 };

constexpr int bytes_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// Element (r, c) lies at data[r * stride + c].
struct Matrix {
  void* data = nullptr;  // null: an optional output that is not wanted
  Type type = Type::kBFloat16;
  int64_t rows = 0, columns = 0, stride = 0;
};

// Which weights are kept. If `words` is given, it holds 1 bit per weight; else scores are compared with thresholds.
struct Keep {
  const uint32_t* words = nullptr;  // (N, ceil(K / 32)), contiguous, lowest bit first
  Matrix scores;
  const void* thresholds = nullptr;  // of the scores' type
  int64_t threshold_stride = 0;      // elements from row to row; 0: one threshold for the matrix
  bool magnitude = true;             // |score| >= threshold, else score >= threshold
};

// The sign factor of d_scores: 1 if both are null.
struct Sign {
  Matrix scores;                    // sign(score), 0 for a score of 0
  const uint32_t* words = nullptr;  // (N, ceil(K / 32)): bit set +1, else -1
};

// out (M, N) = in (M, K) @ where(keep, weight, 0).T + bias; transposed: out (M, K) = in (M, N) @ where(keep, weight, 0).
struct Product {
  Matrix out, in, weight;  // of the same 16-bit type
  Keep keep;
  const void* bias = nullptr;  // (N,), of weight's type
  bool transposed = false;
  void* workspace = nullptr;  // as many bytes as the kernel's plan says, with any content; null: the sum has one part
  int tokens = 0, parts = 0;  // of product_sm90's tile and sum, if they are not to be planned; else 0
};

// G = grad_output.T @ x (N, K), never stored: d_scores = [d_scores +] G [* weight] * sign;
// d_weight = where(keep, G, 0).
struct ScoreGrad {
  Matrix d_scores;         // any type; no data: not wanted
  Matrix d_weight;         // weight's type; no data: not wanted
  Matrix grad_output, x;   // (M, N) and (M, K), of weight's type
  Matrix weight;  // no data: not a factor of d_scores; its type and size still describe the problem
  Sign sign;
  Keep keep;               // read for d_weight only
  bool accumulate = false;  // add to d_scores instead of replacing it
  void* workspace = nullptr;  // as in Product
};

// threshold = the k-th largest key of `count` contiguous scores, +inf if k is 0, NaN if a score is not finite.
struct Select {
  const void* scores = nullptr;
  Type type = Type::kBFloat16;
  int64_t count = 0, k = 0;
  bool magnitude = true;
  void* threshold = nullptr;      // one element of the scores' type
  void* workspace = nullptr;      // select_workspace() bytes, of any content
};

// Write keep as bits to words (N, ceil(K / 32)).
struct PackMask {
  uint32_t* words = nullptr;
  Keep keep;
};

// Write score > 0 as bits to words, and the number of scores that are exactly 0 to *zeros.
struct PackSigns {
  uint32_t* words = nullptr;
  int64_t* zeros = nullptr;
  Matrix scores;
};

// Where a kernel runs: `stream` is a cudaStream_t.
struct Device {
  void* stream = nullptr;
  int multiprocessors = 1;
  int capability = 80;  // 10 * major + minor
  int shared_bytes = 100 * 1024;  // of a multiprocessor; the default is the least of any GPU from 8.0 on
  int l2_bytes = 40 << 20;
};

// The plan of a launch: the time that it is expected to take (tile_cost.h), and the settings and workspace for that
// time.
struct Plan {
  double cycles = 0;
  int tokens = 0, parts = 1;  // tokens of a tile, parts of the sum
  int64_t workspace = 0;      // bytes
};

// Each function launches its kernels and returns an error text, or "" on success. Matrices have unit column stride and
// may be empty. The sm_90 functions take the problems for which refusal_sm90 returns ""; the others take all of the
// above.
std::string refusal_sm90(const Product&);
std::string refusal_sm90(const ScoreGrad&);
Plan plan_sm90(const Product&, const Device&);
Plan plan_sm80(const Product&, const Device&);
Plan plan_sm90(const ScoreGrad&, const Device&);
Plan plan_sm80(const ScoreGrad&, const Device&);
std::string product_sm90(const Product&, const Device&);
std::string score_grad_sm90(const ScoreGrad&, const Device&);
std::string product_sm80(const Product&, const Device&);

// The two kernels that product_sm80 and plan_sm80 choose from. The product must have results.
bool takes_decode(const Product&);
bool decodes(const Product&, const Device&);  // whether decode_sm80 is chosen
Plan plan_decode(const Product&, const Device&);
Plan plan_general(const Product&, const Device&);
std::string decode_sm80(const Product&, const Device&);
std::string product_general(const Product&, const Device&);

std::string sum_parts(const Product&, int count, int64_t stride, const Device&);  // sums p.workspace (count, M, stride)
std::string score_grad_sm80(const ScoreGrad&, const Device&);
std::string kept_threshold(const Select&, const Device&);
std::string pack_mask(const PackMask&, const Device&);
std::string pack_signs(const PackSigns&, const Device&);

int64_t select_workspace(Type type);

}  // namespace mft::cuda
