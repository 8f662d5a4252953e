// Reads of shared memory that are under way. Here a read has its values at once. On a GPU it has them only when
// something that needs them has waited: an arrival may be seen earlier, and TMA may then fill the stage that is still
// being read.
//
//   load ----> Register ----> Register ----> wgmma of all lanes, or an arrival that depends on it: the read has ended
//                      & | ^ + ~ << >>, bytes, levels, products
//
// So a Register knows the reads that it comes from. A TMA load into the memory of one of these reads is a fault,
// whatever the timing of the background work. A warp's read ends for all of its lanes at once, because they share one
// instruction.
//
// Reads into plain words end at the warp's next barrier, which orders everything but TMA. Until then, no cp.async may
// be issued into the memory that they read.
#pragma once

#include <algorithm>
#include <map>

#include "machine.h"

namespace mft::cuda::emulator {

struct ReadUnderWay {
  std::vector<const char*> chunks;  // 16-byte chunks
  int lanes_done = 0;
};

struct ReadsUnderWay {
  std::map<std::pair<int, int>, std::map<int, ReadUnderWay>> of;  // key: rank and warp; then the number of the read
  std::map<std::pair<int, int>, int> issued;                      // key: rank and thread; the number of its next read
  std::vector<std::vector<uint32_t>> readers;  // into plain words: by rank and chunk, one bit per warp
  std::map<std::pair<int, int>, int> at_barrier;  // key: rank and warp; how many lanes have reached one
};

inline const char* chunk_at(const void* p) {
  return static_cast<const char*>(p) - reinterpret_cast<uintptr_t>(p) % 16;
}

inline std::pair<int, int> this_warp() {
  const Thread& self = this_thread();
  return {self.block->rank, self.index / 32};
}

inline std::string name_of(std::pair<int, int> warp) {
  return "warp " + std::to_string(warp.second) + " of rank " + std::to_string(warp.first);
}

// Begin the lane's part of its warp's next read; return the number of the read.
inline int begin_read(const void* p) {
  ReadsUnderWay& reads = cluster_state<ReadsUnderWay>();
  const int number = reads.issued[{this_warp().first, this_thread().index}]++;
  reads.of[this_warp()][number].chunks.push_back(chunk_at(p));
  return number;
}

inline void end_read(int number, int lanes) {
  auto& of_warp = cluster_state<ReadsUnderWay>().of[this_warp()];
  const auto read = of_warp.find(number);
  if (read != of_warp.end() && (read->second.lanes_done += lanes) >= 32) of_warp.erase(read);
}

// It is a fault if TMA or a thread writes into memory of that rank that is still being read.
inline void check_no_read(int rank, const char* begin, int64_t bytes, const char* what) {
  for (const auto& [warp, reads] : cluster_state<ReadsUnderWay>().of) {
    if (warp.first != rank) continue;
    for (const auto& [number, read] : reads) {
      for (const char* chunk : read.chunks) {
        if (chunk + 16 <= begin || chunk >= begin + bytes) continue;
        fault(what + std::string(" into shared offset ") + std::to_string(chunk - block_of_rank(rank).shared) +
              ", which " + name_of(warp) + " still reads");
      }
    }
  }
}

// The warps that read each chunk of this block's shared memory into plain words.
inline std::vector<uint32_t>& readers() {
  auto& readers = cluster_state<ReadsUnderWay>().readers;
  readers.resize(static_cast<size_t>(cluster_size()));
  auto& of_block = readers[static_cast<size_t>(this_thread().block->rank)];
  of_block.resize(static_cast<size_t>(this_thread().block->shared_bytes + 15) / 16);
  return of_block;
}

// Only this block's shared memory is followed.
inline void read_until_barrier(const void* p) {
  const ptrdiff_t offset = static_cast<const char*>(p) - this_thread().block->shared;
  if (offset < 0 || offset >= this_thread().block->shared_bytes) return;
  readers()[static_cast<size_t>(offset / 16)] |= 1u << this_warp().second;
}

// Takes effect once all lanes have arrived.
inline void end_reads_at_barrier() {
  if (++cluster_state<ReadsUnderWay>().at_barrier[this_warp()] % 32 != 0) return;
  for (uint32_t& warps : readers()) warps &= ~(1u << this_warp().second);
}

inline void check_no_read_until_barrier(const void* p) {
  const int64_t offset = shared_offset(p, 1, 1, "copy_async");
  const uint32_t warps = readers()[static_cast<size_t>(offset / 16)];
  if (warps == 0) return;
  fault("copy_async into shared offset " + std::to_string(offset) + ", which " +
        name_of({this_warp().first, __builtin_ctz(warps)}) + " has read since its last barrier");
}

}  // namespace mft::cuda::emulator

namespace mft::cuda::isa {

struct Register {
  static constexpr int kMost = 6;
  uint32_t bits = 0;
  int reads[kMost] = {};
  int count = 0;

  Register() = default;
  Register(uint32_t bits) : bits(bits) {}

  static Register of_read(uint32_t bits, int number) {
    Register loaded(bits);
    loaded.reads[loaded.count++] = number;
    return loaded;
  }

  // These bits, computed from this register.
  Register with(uint32_t made) const {
    Register result = *this;
    result.bits = made;
    return result;
  }

  // These bits, computed from this register and the other.
  Register with(uint32_t made, const Register& other) const {
    Register result = with(made);
    for (int i = 0; i < other.count; ++i) {
      if (std::find(result.reads, result.reads + result.count, other.reads[i]) != result.reads + result.count) continue;
      if (result.count == kMost) emulator::fault("a register comes from more reads than the emulator follows");
      result.reads[result.count++] = other.reads[i];
    }
    return result;
  }

  Register& operator&=(const Register& b) { return *this = with(bits & b.bits, b); }
};

inline Register operator&(const Register& a, const Register& b) { return a.with(a.bits & b.bits, b); }
inline Register operator|(const Register& a, const Register& b) { return a.with(a.bits | b.bits, b); }
inline Register operator^(const Register& a, const Register& b) { return a.with(a.bits ^ b.bits, b); }
inline Register operator+(const Register& a, const Register& b) { return a.with(a.bits + b.bits, b); }
inline Register operator~(const Register& a) { return a.with(~a.bits); }
inline Register operator<<(const Register& a, int places) { return a.with(a.bits << places); }
inline Register operator>>(const Register& a, int places) { return a.with(a.bits >> places); }

inline void note_read(const void* p) { emulator::read_until_barrier(p); }

template <class T>
Register load_shared(const T* p) {
  emulator::shared_offset(p, sizeof(T), sizeof(T), "load_shared");
  return Register::of_read(*p, emulator::begin_read(p));
}

}  // namespace mft::cuda::isa
