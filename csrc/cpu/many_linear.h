// The masked linear layer for few tokens with a mask each, out of several: the weight is read once for all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "capability.h"
#include "matrix.h"

namespace mft {

// y (M, N): row i = x[i] @ where(masks[m], weight, 0).T + bias, m = tasks[i / each]; -1: the whole weight.
// masks: words (N, ceil(K / 32)) each; bias (N,) or nullptr. Every row has the bits of few_masked_linear() with its mask.
// Nothing is empty, and every m is -1 or one of the masks.
void many_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
                        const std::vector<const uint32_t*>& masks, const int64_t* tasks, int64_t each, const void* bias);

// Whether that is faster than a product for each of the `used` masks: as long as these would read the weight once for few
// tokens too, on average. SmolLM2's linears in bf16, 3 masks, in times of one product a mask: 12 rows 0.92, 24 rows 0.92, 48
// rows 1.16; 8 masks, 64 rows 0.86; in fp32 3 masks and 128 rows 0.91 (Xeon with AMX).
bool is_read_once(const Capability& cpu, const Matrix& x, const Matrix& weight, int64_t used);

}  // namespace mft
