// isa.h on the host: each instruction as the PTX manual defines it, in plain C++.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "reads.h"

#define MFT_DEVICE inline

namespace mft::cuda::isa {

inline int thread() { return emulator::this_thread().index; }
inline int lane() { return thread() % 32; }
inline int warp() { return thread() / 32; }
inline int64_t block(int axis) { return emulator::this_thread().block->index[axis]; }
inline int64_t blocks(int axis) { return emulator::current_launch().grid[axis]; }
inline char* shared_memory() { return emulator::this_thread().block->shared; }

// ------------------------------------------------------------------------------------------------------ numbers

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Float16 value) {
  const uint32_t exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3ff;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else {  // no branch for zeros, which are frequent
    const auto places = static_cast<float>(fraction + (exponent != 0) * 1024);
    magnitude = places * as_float((std::max(exponent, 1u) + 127 - 25) << 23);
  }
  return value.bits >> 15 ? -magnitude : magnitude;
}

// Round to nearest, ties to even; NaN becomes the canonical NaN.
template <class T>
T round_to(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    if (std::isnan(value)) return {0x7fff};
    const uint32_t bits = as_bits(value);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    if (std::isnan(value)) return {0x7fff};
    const auto sign = static_cast<uint16_t>(as_bits(value) >> 16 & 0x8000);
    const double magnitude = std::fabs(static_cast<double>(value));
    if (magnitude == 0) return {sign};
    if (magnitude >= 65520.0) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int unit = std::max(exponent - 11, -24);  // weight of the last place
    const double places = std::nearbyint(std::ldexp(magnitude, -unit));
    // 2^10 .. 2^11 units above the subnormals; a carry into the next exponent is correct without extra code.
    const int biased = unit == -24 && places < 1024 ? 0 : unit + 24;
    return {static_cast<uint16_t>(sign + (biased << 10) + static_cast<int>(places))};
  }
}

template <class T>
uint32_t round_pair(float low, float high) {
  return round_to<T>(low).bits | static_cast<uint32_t>(round_to<T>(high).bits) << 16;
}

inline float magnitude(float value) { return std::fabs(value); }
inline uint32_t spread_signs(uint32_t pair) { return (pair >> 31) * 0xffff0000u | (pair >> 15 & 1) * 0xffffu; }
inline uint32_t spread_signs(uint32_t low, uint32_t high) { return spread_signs((low & 0x8000) | (high & 0x80000000u)); }
inline Register spread_signs(const Register& pair) { return pair.with(spread_signs(pair.bits)); }
inline Register spread_signs(const Register& low, const Register& high) {
  return low.with(spread_signs(low.bits, high.bits), high);
}

// --------------------------------------------------------------------------------------------- warps and blocks

inline void sync_block() {
  emulator::end_reads_at_barrier();
  emulator::Block& block = *emulator::this_thread().block;
  emulator::sync(block.barriers[0], emulator::current_launch().threads, "sync_block");
}

inline void sync_threads(int barrier, int threads) {
  if (barrier < 1 || barrier > 15) emulator::fault("barriers are 1 to 15");
  emulator::end_reads_at_barrier();
  emulator::sync(emulator::this_thread().block->barriers[barrier], threads, "sync_threads");
}

namespace detail {

// Each lane receives the value of lane source(its own number), or keeps its own if there is no such lane.
template <class T, class Source>
T exchange(const char* operation, T value, Source source) {
  struct Input {
    T value;
    int source;
  };
  const Input input{value, source(lane())};
  T output{};
  emulator::collective(operation, &input, &output, [](const void* const* in, void* const* out) {
    for (int i = 0; i < 32; ++i) {
      const int from = static_cast<const Input*>(in[i])->source;
      *static_cast<T*>(out[i]) = static_cast<const Input*>(in[from >= 0 && from < 32 ? from : i])->value;
    }
  });
  return output;
}

}  // namespace detail

template <class T>
T shuffle(T value, int from) {
  return detail::exchange("shuffle", value, [from](int) { return from % 32; });
}

template <class T>
T shuffle_xor(T value, int mask) {
  return detail::exchange("shuffle_xor", value, [mask](int lane) { return lane ^ mask; });
}

inline uint32_t ballot(bool predicate) {
  uint32_t output = 0;
  emulator::collective("ballot", &predicate, &output, [](const void* const* in, void* const* out) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(*static_cast<const bool*>(in[i])) << i;
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(out[i]) = bits;
  });
  return output;
}

inline void sync_warp() {
  emulator::collective("sync_warp", nullptr, nullptr, [](const void* const*, void* const*) {});
}

// ------------------------------------------------------------------------------------------------------- memory

inline uint32_t add_shared(uint32_t* p, uint32_t v) {
  emulator::shared_offset(p, 4, 4, "add_shared");
  const uint32_t before = *p;
  *p += v;
  return before;
}

inline uint32_t add_global(uint32_t* p, uint32_t v) {
  const uint32_t before = *p;
  *p += v;
  return before;
}

inline void add_global(int64_t* p, int64_t v) { *p += v; }
inline void fence_device() {}

struct alignas(16) Words4 {
  uint32_t words[4];
};

inline Words4 load_streaming(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulator::fault("load_streaming needs 16-byte alignment");
  Words4 v;
  std::memcpy(&v, p, 16);
  return v;
}

inline uint32_t load_volatile(const uint32_t* p) { return *static_cast<const volatile uint32_t*>(p); }

// -------------------------------------------------------------------------------------------------------- sm_80

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::shared_offset(shared, kBytes, kBytes, "copy_async");
  emulator::check_no_read_until_barrier(shared);
  if (valid && reinterpret_cast<uintptr_t>(global) % kBytes != 0) emulator::fault("copy_async from a misaligned address");
  auto copy = [=] {
    if (valid) {
      std::memcpy(shared, global, kBytes);
    } else {
      std::memset(shared, 0, kBytes);
    }
  };
  switch (emulator::asynchrony()) {
    case emulator::Asynchrony::kAtIssue:
      return copy();
    case emulator::Asynchrony::kRandom:
      if (emulator::random_numbers()() % 2 == 0) return copy();
      [[fallthrough]];
    case emulator::Asynchrony::kAsLateAsPossible:
      emulator::this_thread().copies.push_back(copy);
  }
}

inline void commit_copies() {
  emulator::Thread& self = emulator::this_thread();
  self.groups.push_back(std::move(self.copies));
  self.copies.clear();
}

template <int kPending>
void wait_copies() {
  auto& groups = emulator::this_thread().groups;
  while (groups.size() > kPending) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

namespace detail {

inline void collect_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  emulator::shared_offset(row, 16, 16, "load_matrices");
  emulator::collective(transposed ? "load_matrices_transposed" : "load_matrices", &row, r,
                       [transposed](const void* const* in, void* const* out) {
                         for (int lane = 0; lane < 32; ++lane) {
                           for (int matrix = 0; matrix < 4; ++matrix) {
                             uint32_t pair = 0;
                             for (int half = 0; half < 2; ++half) {
                               const int g = lane / 4, c = lane % 4 * 2 + half;
                               const int at_row = transposed ? c : g, at_column = transposed ? g : c;
                               const void* source = *static_cast<const void* const*>(in[8 * matrix + at_row]);
                               uint16_t element;
                               std::memcpy(&element, static_cast<const char*>(source) + 2 * at_column, 2);
                               pair |= static_cast<uint32_t>(element) << (16 * half);
                             }
                             static_cast<uint32_t*>(out[lane])[matrix] = pair;
                           }
                         }
                       });
}

// The emulator follows this read: see reads.h.
inline void load_matrices(Register (&r)[4], const void* row, bool transposed) {
  uint32_t words[4];
  collect_matrices(words, row, transposed);
  const int number = emulator::begin_read(row);
  for (int i = 0; i < 4; ++i) r[i] = Register::of_read(words[i], number);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  collect_matrices(r, row, transposed);
  emulator::read_until_barrier(row);
}

template <class T>
float half_of(uint32_t pair, int half) {
  return widen(T{static_cast<uint16_t>(pair >> (16 * half))});
}

}  // namespace detail

inline void load_matrices(uint32_t (&r)[4], const void* row) { detail::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { detail::load_matrices(r, row, true); }
inline void load_matrices(Register (&r)[4], const void* row) { detail::load_matrices(r, row, false); }
inline void load_matrices_transposed(Register (&r)[4], const void* row) { detail::load_matrices(r, row, true); }

template <class T>
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Input {
    uint32_t a[4], b[2];
    float d[4];
  };
  Input input{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  emulator::collective("multiply_16x8x16", &input, d, [](const void* const* in, void* const* out) {
    using Eight [[gnu::vector_size(32)]] = float;
    float a[16][16];
    Eight b[16], sums[16];
    for (int lane = 0; lane < 32; ++lane) {
      const Input& from = *static_cast<const Input*>(in[lane]);
      const int g = lane / 4, c = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        a[g][c + half] = detail::half_of<T>(from.a[0], half);
        a[g + 8][c + half] = detail::half_of<T>(from.a[1], half);
        a[g][c + 8 + half] = detail::half_of<T>(from.a[2], half);
        a[g + 8][c + 8 + half] = detail::half_of<T>(from.a[3], half);
        b[c + half][g] = detail::half_of<T>(from.b[0], half);
        b[c + 8 + half][g] = detail::half_of<T>(from.b[1], half);
      }
      for (int i = 0; i < 4; ++i) sums[g + i / 2 * 8][c + i % 2] = from.d[i];
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) sums[row] += a[row][k] * b[k];  // one after the other
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) static_cast<float*>(out[lane])[i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  });
}

// -------------------------------------------------------------------------------------------------------- sm_90

constexpr int kMostCluster = 8;

inline int rank_in_cluster() { return emulator::this_thread().block->rank; }

namespace detail {
struct ClusterBarrier {
  emulator::Barrier barrier;
};
}  // namespace detail

inline void sync_cluster() {
  emulator::end_reads_at_barrier();
  emulator::sync(emulator::cluster_state<detail::ClusterBarrier>().barrier,
                 emulator::cluster_size() * emulator::current_launch().threads, "sync_cluster");
}

inline float load_of_rank(const float* shared, int rank) {
  const int64_t offset = emulator::shared_offset(shared, 4, 4, "load_of_rank");
  const emulator::Block& block = emulator::block_of_rank(rank);
  if (block.unfinished != emulator::current_launch().threads) {
    emulator::fault("load_of_rank from a block of which threads have ended");
  }
  float value;
  std::memcpy(&value, block.shared + offset, 4);
  return value;
}

// ---------------------------------------------------------------------------------------------------- launching

template <class Kernel>
std::string launch(const LaunchShape& shape, void*, const typename Kernel::Arguments& arguments) {
  const emulator::Launch launch{{shape.x, shape.y, shape.z}, shape.cluster, Kernel::kThreads, shape.shared_bytes,
                                [&arguments] { Kernel::run(arguments); }};
  return emulator::run(launch, emulator::settings());
}

}  // namespace mft::cuda::isa
