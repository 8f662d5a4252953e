// The range of keys that a threshold keeps (see KeepRange).
#pragma once

#include "row_kernels.h"

namespace mft {

// Returns {score : |score| >= threshold}, or {score : score >= threshold}. It is exact for every threshold, also one
// that the format cannot represent. It is empty for a NaN threshold, and NaN scores never belong to it.
KeepRange range_at_least(double threshold, Format format, bool magnitude);

KeepRange range_positive(Format format);  // score > 0
KeepRange range_zero(Format format);      // score == 0

// Returns the value whose key is `key`: the inverse of the key that keep_bits() computes.
double value_of_key(int64_t key, Format format, bool magnitude);

// The keys of +infinity and of the least value (0 for magnitudes, else -infinity).
int64_t infinity_key(Format format);
int64_t least_key(Format format, bool magnitude);

}  // namespace mft
