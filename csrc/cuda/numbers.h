// The 16-bit floats as storage: conversions are instructions (isa.h).
#pragma once

#include <cstdint>

namespace mft::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace mft::cuda
