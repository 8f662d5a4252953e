// Large fresh memory in huge pages. 64 MiB of new gradients cost 16,384 page faults with pages of 4 KiB, 32 with huge
// ones.
#pragma once

#include <cstdint>

namespace mft {

constexpr int64_t kHugePage = 2 << 20;

// Asks for huge pages for memory that nobody has written to yet. Has no effect on small memory or if the system has no
// such pages.
void advise_huge_pages(void* memory, int64_t bytes);

// Makes the operating system create all pages of memory that is about to be written, in one call. Their contents stay.
// Writing 400 MB of new memory with 2 threads took 75 ms, compared with 109 ms with a fault per page (a virtual Xeon
// with AMX).
void map_pages(void* memory, int64_t bytes);

}  // namespace mft
