// Large fresh memory in huge pages: 64 MiB of new gradients cost 16,384 page faults in pages of 4 KiB, 32 in huge ones.
#pragma once

#include <cstdint>

namespace mft {

constexpr int64_t kHugePage = 2 << 20;

// A hint for memory that nobody has written yet. Without effect on small memory, and where the system has no such pages.
void advise_huge_pages(void* memory, int64_t bytes);

// Has the kernel make the pages of memory that is about to be written all at once; what they hold stays. 400 MB of new
// memory, written by 2 threads: 75 ms for 109 with a fault a page (a virtual Xeon with AMX).
void map_pages(void* memory, int64_t bytes);

}  // namespace mft
