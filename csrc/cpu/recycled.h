// Memory of large matrices that is used again when they are freed. From 32 MB on, the C library returns freed memory to
// the system at once, and the next matrix gets pages that the system has to clear: half of a backward pass of 16 tokens
// at 4096 x 4096. Memory that is kept here is marked as free (MADV_FREE): the system takes it back when it needs it.
#pragma once

#include <cstdint>

namespace mft {

constexpr int64_t kRecycledBytes = int64_t{32} << 20;  // the least

// Returns memory for `bytes`, uninitialised: the memory of a freed matrix of this size, or else new memory, in huge pages
// if asked. Then memory of other sizes goes back to the system. nullptr if there is none.
void* take_recycled(int64_t bytes, bool huge_pages);

void recycle(void* memory);  // frees what take_recycled() returned

}  // namespace mft
