// Memory of large matrices that is used again when they are freed (recycled.h).
#include "recycled.h"

#if defined(__linux__) && !defined(MFT_OWN_THREADS)
#include <sys/mman.h>

#include <map>
#include <mutex>
#include <vector>

#include "huge_pages.h"

namespace mft {
namespace {

struct Memory {
  std::mutex changing;
  std::map<void*, int64_t> sizes;  // of all memory
  std::vector<void*> free;         // the last one was freed last
};

Memory& memory() {
  static Memory* one = new Memory;  // never destroyed: tensors may outlive all of a program's own objects
  return *one;
}

}  // namespace

void* take_recycled(int64_t bytes, bool huge_pages) {
  Memory& m = memory();
  const std::lock_guard<std::mutex> lock(m.changing);
  for (size_t i = m.free.size(); i-- > 0;) {
    void* const found = m.free[i];
    if (m.sizes[found] != bytes) continue;
    m.free.erase(m.free.begin() + static_cast<std::ptrdiff_t>(i));
    return found;
  }
  for (void* other : m.free) munmap(other, m.sizes[other]), m.sizes.erase(other);
  m.free.clear();
  void* const made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) return nullptr;
  if (huge_pages) advise_huge_pages(made, bytes);
  m.sizes[made] = bytes;
  return made;
}

void recycle(void* freed) {
  Memory& m = memory();
  const std::lock_guard<std::mutex> lock(m.changing);
  madvise(freed, m.sizes[freed], MADV_FREE);
  m.free.push_back(freed);
}

}  // namespace mft

#else  // no MADV_FREE; and sanitizers follow the C library's memory only

namespace mft {
void* take_recycled(int64_t, bool) { return nullptr; }
void recycle(void*) {}
}  // namespace mft

#endif
