// Reads of shared memory that are under way. A read has its values at once here, but on a GPU only when something that
// needs them has waited: an arrival may be seen before that, and TMA may fill the stage that is still being read.
//
//   load ----> Register ----> Register ----> wgmma of all lanes, or an arrival that depends on it: the read has ended
//                      & | + ~ << >>
//
// So a Register knows the reads that it comes from, and a TMA load into what one of them reads is a fault, however the
// background work is timed. A warp's read ends for all of its lanes: they share one instruction.
//
// Reads into plain words end at the warp's next barrier, which orders all but TMA; until then no cp.async may be issued
// into what they read.
#pragma once

#include <algorithm>
#include <map>

#include "machine.h"

namespace mft::cuda::emulator {

struct ReadUnderWay {
  std::vector<const char*> chunks;  // of 16 bytes
  int lanes_done = 0;
};

struct ReadsUnderWay {
  std::map<std::pair<int, int>, std::map<int, ReadUnderWay>> of;  // rank and warp; by number
  std::map<std::pair<int, int>, int> issued;                      // by rank and thread: the number of its next read
  std::map<const char*, uint32_t> readers;                        // of a chunk into plain words: a bit for each warp
  std::map<std::pair<int, int>, std::vector<const char*>> until_barrier;  // rank and warp
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

// The lane's part of its warp's next read; returns the number.
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

// Of TMA into the shared memory of that rank.
inline void check_no_read(int rank, const char* begin, int64_t bytes) {
  for (const auto& [warp, reads] : cluster_state<ReadsUnderWay>().of) {
    if (warp.first != rank) continue;
    for (const auto& [number, read] : reads) {
      for (const char* chunk : read.chunks) {
        if (chunk + 16 <= begin || chunk >= begin + bytes) continue;
        fault("TMA loads into shared offset " + std::to_string(chunk - block_of_rank(rank).shared) + ", which " +
              name_of(warp) + " still reads");
      }
    }
  }
}

inline void read_until_barrier(const void* p) {
  ReadsUnderWay& reads = cluster_state<ReadsUnderWay>();
  reads.readers[chunk_at(p)] |= 1u << this_warp().second;
  reads.until_barrier[this_warp()].push_back(chunk_at(p));
}

// The first lane to come: all have read by then.
inline void end_reads_at_barrier() {
  ReadsUnderWay& reads = cluster_state<ReadsUnderWay>();
  std::vector<const char*>& chunks = reads.until_barrier[this_warp()];
  for (const char* chunk : chunks) reads.readers[chunk] &= ~(1u << this_warp().second);
  chunks.clear();
}

inline void check_no_read_until_barrier(const void* p) {
  const auto& readers = cluster_state<ReadsUnderWay>().readers;
  const auto found = readers.find(chunk_at(p));
  if (found == readers.end() || found->second == 0) return;
  fault("copy_async into shared offset " + std::to_string(shared_offset(p, 1, 1, "copy_async")) + ", which " +
        name_of({this_warp().first, __builtin_ctz(found->second)}) + " has read since its last barrier");
}

}  // namespace mft::cuda::emulator

namespace mft::cuda::isa {

struct Register {
  static constexpr int kMost = 3;
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

  // These bits, made of this.
  Register with(uint32_t made) const {
    Register result = *this;
    result.bits = made;
    return result;
  }

  // And of the other.
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
inline Register operator+(const Register& a, const Register& b) { return a.with(a.bits + b.bits, b); }
inline Register operator~(const Register& a) { return a.with(~a.bits); }
inline Register operator<<(const Register& a, int places) { return a.with(a.bits << places); }
inline Register operator>>(const Register& a, int places) { return a.with(a.bits >> places); }

template <class T>
Register load_shared(const T* p) {
  emulator::shared_offset(p, sizeof(T), sizeof(T), "load_shared");
  return Register::of_read(*p, emulator::begin_read(p));
}

}  // namespace mft::cuda::isa
