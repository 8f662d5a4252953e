#include "in_place.h"

#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.h"

namespace mft {
namespace {

// Rows with about 32,768 elements are worth a thread.
int64_t grain(const Bits& bits) { return 1 + 32768 / (bits.columns + 1); }

int64_t count_in(const Bits& bits, int64_t r) {
  int64_t count = 0;
  for (int64_t w = 0; w < bits.row_words(); ++w) count += __builtin_popcount(bits.dropped(r, w));
  return count;
}

// Returns where each row's dropped elements begin among all dropped elements. The last entry is their total number.
std::vector<int64_t> begins(const Bits& bits) {
  std::vector<int64_t> found(bits.rows + 1, 0);
  parallel_for(0, bits.rows, grain(bits), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) found[r + 1] = count_in(bits, r);
  });
  for (int64_t r = 0; r < bits.rows; ++r) found[r + 1] += found[r];
  return found;
}

// Calls f(pointer to an element's type, row) for all rows, on all threads. Elements have 2 or 4 bytes.
template <typename F>
void for_rows(const Bits& bits, int64_t element, const F& f) {
  parallel_for(0, bits.rows, grain(bits), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      element == 2 ? f(static_cast<uint16_t*>(nullptr), r) : f(static_cast<uint32_t*>(nullptr), r);
    }
  });
}

// Calls f(column) for each set bit, from the lowest.
template <typename F>
void for_each_bit(uint32_t bits, int64_t first, const F& f) {
  for (; bits != 0; bits &= bits - 1) f(first + __builtin_ctz(bits));
}

}  // namespace

int64_t dropped_count(const Bits& bits) { return begins(bits).back(); }

void put_aside(void* to, const void* weight, int64_t element, const Bits& bits, const void* aside, const Bits& held) {
  const std::vector<int64_t> ours = begins(bits), theirs = aside == nullptr ? ours : begins(held);
  for_rows(bits, element, [&](auto* type, int64_t r) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* row = static_cast<const T*>(weight) + r * bits.columns;
    T* out = static_cast<T*>(to) + ours[r];
    const T* in = static_cast<const T*>(aside) + (aside == nullptr ? 0 : theirs[r]);
    for (int64_t w = 0; w < bits.row_words(); ++w) {
      const uint32_t now = bits.dropped(r, w), before = aside == nullptr ? 0 : held.dropped(r, w);
      if (now == before) {  // so in nearly all words, because few bits flip in a step
        const int count = __builtin_popcount(now);
        std::memcpy(out, in, count * sizeof(T));
        out += count, in += count;
        continue;
      }
      for_each_bit(now | before, 0, [&](int64_t column) {
        const T value = before >> column & 1 ? *in++ : row[32 * w + column];
        if (now >> column & 1) *out++ = value;
      });
    }
  });
}

void put_back(void* weight, int64_t element, const void* aside, const Bits& held, const Bits* wanted) {
  const std::vector<int64_t> first = begins(held);
  for_rows(held, element, [&](auto* type, int64_t r) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* row = static_cast<T*>(weight) + r * held.columns;
    const T* in = static_cast<const T*>(aside) + first[r];
    for (int64_t w = 0; w < held.row_words(); ++w) {
      const uint32_t before = held.dropped(r, w), keep = wanted == nullptr ? ~0u : ~wanted->dropped(r, w);
      if ((before & keep) == 0) {
        in += __builtin_popcount(before);
        continue;
      }
      for_each_bit(before, 0, [&](int64_t column) {
        if (keep >> column & 1) row[32 * w + column] = *in;
        ++in;
      });
    }
  });
}

void drop(void* weight, int64_t element, const Bits& bits, const Bits* held) {
  for_rows(bits, element, [&](auto* type, int64_t r) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* row = static_cast<T*>(weight) + r * bits.columns;
    for (int64_t w = 0; w < bits.row_words(); ++w) {
      const uint32_t before = held == nullptr ? 0 : held->dropped(r, w);
      for_each_bit(bits.dropped(r, w) & ~before, 32 * w, [&](int64_t column) { row[column] = 0; });
    }
  });
}

}  // namespace mft
