// From a threshold to the range of keys that are kept (see KeepRange).
#pragma once

#include "row_kernels.h"

namespace mft {

// {score : |score| >= threshold}, or {score : score >= threshold}. Exact for every threshold, also one that the
// format cannot represent; empty for NaN; NaN scores never belong to it.
KeepRange range_at_least(double threshold, Format format, bool magnitude);

KeepRange range_positive(Format format);  // score > 0
KeepRange range_zero(Format format);      // score == 0

// The value whose key is `key`: the inverse of what keep_bits computes.
double value_of_key(int64_t key, Format format, bool magnitude);

// Keys of +infinity, and of the least value (0 in magnitude, -infinity else).
int64_t infinity_key(Format format);
int64_t least_key(Format format, bool magnitude);

}  // namespace mft
