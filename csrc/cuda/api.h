// What the bindings ask of the kernels: plain structs and pointers, neither torch nor CuTe.
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
  void* data = nullptr;  // null: not wanted, where an output may be left out
  Type type = Type::kBFloat16;
  int64_t rows = 0, columns = 0, stride = 0;
};

// Which weights are kept: by `words`, 1 bit a weight, if it is given; else by scores and their thresholds.
struct Keep {
  const uint32_t* words = nullptr;  // (N, ceil(K / 32)), contiguous, lowest bit first
  Matrix scores;
  const void* thresholds = nullptr;  // of the scores' type
  int64_t threshold_stride = 0;      // from row to row; 0: one threshold for the matrix
  bool magnitude = true;             // |score| >= threshold, else score >= threshold
};

// The factor of d_scores: 1 if both are null.
struct Sign {
  Matrix scores;                    // sign(score), 0 for a score of 0
  const uint32_t* words = nullptr;  // (N, ceil(K / 32)): bit set +1, else -1
};

// out (M, N) = in (M, K) @ where(keep, weight, 0).T + bias; transposed: out (M, K) = in (M, N) @ where(keep, weight, 0).
struct Product {
  Matrix out, in, weight;  // one 16-bit type
  Keep keep;
  const void* bias = nullptr;  // (N,), of weight's type
  bool transposed = false;
  void* workspace = nullptr;  // as many bytes as the kernel's plan says, of any content; null: the sum is in one part
  int tokens = 0, parts = 0;  // of product_sm90's tile and sum, where they are not to be planned; else 0
};

constexpr int kMostMasks = 16;

// out[i] (N,) = in[i] @ where(masks[tasks[i / each]], weight, 0).T + bias; all is kept for task -1, and NaN comes of one
// that there is not.
struct ManyProduct {
  Matrix out, in, weight;  // one 16-bit type
  const uint32_t* masks[kMostMasks] = {};  // each (N, ceil(K / 32)), contiguous
  int count = 0;
  const void* tasks = nullptr;  // int64 or int32, contiguous, one for each `each` rows of in
  bool long_tasks = false;
  int64_t each = 1;
  const void* bias = nullptr;  // as Product's, and so the workspace
  void* workspace = nullptr;
};

// A weight (rows, columns) in codes, as mft_kernels/codes.py decodes them; contiguous, at any address.
struct Quantized {
  bool nf4 = true;  // else int8
  int64_t rows = 0, columns = 0;
  const void* codes = nullptr;     // nf4: two a byte, the first in the high bits
  const float* absmax = nullptr;   // nf4: one for each 64 of the whole matrix, or null: double quantisation; int8: for each row
  const uint8_t* absmax_codes = nullptr;  // of double quantisation: absmax = map[code] * nested[place / 256] + offset
  const float *nested = nullptr, *map = nullptr, *offset = nullptr;
};

// As Product, of a decoded weight.
struct QuantizedProduct {
  Matrix out, in;  // one 16-bit type, to which the weight is rounded
  Quantized weight;
  const uint32_t* words = nullptr;  // as Keep's; null: all is kept
  const void* bias = nullptr;
  bool transposed = false;
  void* workspace = nullptr;
  int tokens = 0, parts = 0;  // of product_sm90's, as Product's
};

// G = grad_output.T @ x (N, K), never stored: d_scores = [d_scores +] G [* weight] * sign;
// d_weight = where(keep, G, 0).
struct ScoreGrad {
  Matrix d_scores;         // any type; or no data
  Matrix d_weight;         // weight's type; or no data
  Matrix grad_output, x;   // (M, N) and (M, K), of weight's type
  Matrix weight;  // no data: not a factor of d_scores; its type and size are those of the problem all the same
  Sign sign;
  Keep keep;               // read for d_weight only
  bool accumulate = false;  // add to d_scores instead of replacing it
  void* workspace = nullptr;  // as Product's
};

// Product of the rows of each expert, nobody's rows 0; offsets (E,) say where those of each end (groups_sm80.h).
struct GroupedProduct {
  Product of;  // in and out: all rows; weight, scores and words: the first expert's; one threshold an expert, bias (E, N)
  const int32_t* offsets = nullptr;
  int64_t experts = 0;
  int64_t weight_stride = 0, score_stride = 0;  // elements from one expert to the next
};

// The d_scores of each expert from its own rows, (E, N, K) and contiguous; of one without rows 0, or as it was.
struct GroupedScoreGrad {
  ScoreGrad of;  // grad_output and x: all rows; the others: the first expert's; no d_weight
  const int32_t* offsets = nullptr;
  int64_t experts = 0;
  int64_t weight_stride = 0, score_stride = 0;
};

// threshold = the k-th largest key of `count` contiguous scores, +inf if k is 0, NaN if a score is not finite;
// then, if words are given, the mask of the scores as (rows, columns).
struct Select {
  const void* scores = nullptr;
  Type type = Type::kBFloat16;
  int64_t count = 0, k = 0;
  bool magnitude = true;
  void* threshold = nullptr;      // one element of the scores' type
  void* workspace = nullptr;      // select_workspace() bytes, of any content
  uint32_t* words = nullptr;      // (rows, ceil(columns / 32)), or null
  int64_t rows = 0, columns = 0;  // rows * columns == count
  const uint32_t* only_if = nullptr;  // on the device: where it holds 0, the threshold is left as it is
};

// kFixed16: sign and magnitude in steps of 2^-18, selected as fp16.
enum class ScoreFormat : int { kFloat32, kBFloat16, kFixed16 };

// One AdamW step on contiguous scores and moments, in place (mft_kernels/reference/step.py); then the threshold and the
// mask of the new scores, as Select, if they are asked for.
struct ScoreStep {
  void* scores = nullptr;
  ScoreFormat format = ScoreFormat::kFloat32;
  int64_t rows = 0, columns = 0;
  const void* grad = nullptr;
  Type grad_type = Type::kFloat32;
  const void* weight = nullptr;  // or null: neither it nor the sign is a factor
  Type weight_type = Type::kFloat32;
  void* exp_avg = nullptr;              // fp32, or codes of 8 bits with scales
  void* exp_avg_sq = nullptr;
  float* scales = nullptr;              // (2, ceil(count / 256)), or null
  const float* grad_scale = nullptr;    // or null
  float decay = 1;                      // 1 - lr * weight_decay
  float beta1 = 0, rest1 = 1, beta2 = 0, rest2 = 1;  // rest: 1 - beta
  float minus_step_size = 0;            // -lr / (1 - beta1^step)
  float correction = 1;                 // (1 - beta2^step)^0.5; with scales its inverse
  float eps = 0;
  uint32_t step = 1;
  uint64_t seed = 0;
  bool magnitude = true;
  int64_t k = 0;
  void* threshold = nullptr;            // one element of the scores' format, or null: only the step
  const void* hint = nullptr;           // the threshold before the step, or null
  uint32_t* words = nullptr;            // (rows, ceil(columns / 32))
  void* workspace = nullptr;            // step_workspace() bytes, of any content; the first word becomes 0 if the hint
                                        // spared a pass over the scores
  const void* clock = nullptr;          // step, decay, minus_step_size and correction in memory, or null: those above
};

// words (N, ceil(K / 32)): keep as bits.
struct PackMask {
  uint32_t* words = nullptr;
  Keep keep;
};

// words: score > 0 as bits; *zeros: how many scores are exactly 0.
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
  int shared_bytes = 100 * 1024;  // of a multiprocessor; the least of any GPU from 8.0 on
  int l2_bytes = 40 << 20;
};

// Of a launch, before it: what it is expected to take (tile_cost.h), and what it needs to take no longer.
struct Plan {
  double cycles = 0;
  int tokens = 0, parts = 1;  // of a tile, and of the sum
  int64_t workspace = 0;      // bytes
};

// Each launches and returns what went wrong, "" if nothing did. Matrices have unit column stride; they may be empty.
// The sm_90 functions take what their `refusal` returns "" for, the others everything above.
std::string refusal_sm90(const Product&);
std::string refusal_sm90(const QuantizedProduct&);
std::string refusal_sm90(const GroupedProduct&);
std::string refusal_sm90(const ScoreGrad&);
Plan plan_sm90(const Product&, const Device&);
Plan plan_sm80(const Product&, const Device&);
Plan plan_sm90(const QuantizedProduct&, const Device&);
Plan plan_sm90(const GroupedProduct&, const Device&);  // by the number of all rows, which is what the host knows
Plan plan_sm80(const GroupedProduct&, const Device&);
Plan plan_sm90(const ScoreGrad&, const Device&);
Plan plan_sm80(const ScoreGrad&, const Device&);
std::string product_sm90(const Product&, const Device&);
std::string product_sm90(const QuantizedProduct&, const Device&);
std::string product_sm90(const GroupedProduct&, const Device&);
std::string score_grad_sm90(const ScoreGrad&, const Device&);
std::string product_sm80(const Product&, const Device&);

// The two that product_sm80 and plan_sm80 choose from, of products with results.
bool takes_decode(const Product&);
bool decodes(const Product&, const Device&);  // whether decode_sm80 is chosen
Plan plan_decode(const Product&, const Device&);
Plan plan_general(const Product&, const Device&);
std::string decode_sm80(const Product&, const Device&);
std::string product_general(const Product&, const Device&);

Plan plan_many(const ManyProduct&, const Device&);
std::string product_many(const ManyProduct&, const Device&);
Plan plan_quantized(const QuantizedProduct&, const Device&);  // of the one that product_quantized chooses
std::string product_quantized(const QuantizedProduct&, const Device&);

// The two that product_quantized and plan_quantized choose from, of products with results.
bool takes_decode(const QuantizedProduct&);
bool decodes(const QuantizedProduct&, const Device&);
Plan plan_decode(const QuantizedProduct&, const Device&);
Plan plan_general(const QuantizedProduct&, const Device&);
std::string decode_sm80(const QuantizedProduct&, const Device&);
std::string product_general(const QuantizedProduct&, const Device&);

int grouped_tokens(const GroupedProduct&);  // of a tile
bool reads_scores(const GroupedProduct&);   // else it takes words alone
std::string grouped_product(const GroupedProduct&, const Device&);
std::string grouped_score_grad(const GroupedScoreGrad&, const Device&);
std::string sum_parts(const Product&, int count, int64_t stride, const Device&);  // of p.workspace (count, M, stride)
std::string score_grad_sm80(const ScoreGrad&, const Device&);
std::string kept_threshold(const Select&, const Device&);
std::string pack_mask(const PackMask&, const Device&);
std::string pack_signs(const PackSigns&, const Device&);

std::string score_step(const ScoreStep&, const Device&);

std::string refusal(const Select&);  // which kept_threshold takes if it is ""
int64_t select_workspace(Type type);
int64_t step_workspace(ScoreFormat format);

}  // namespace mft::cuda
