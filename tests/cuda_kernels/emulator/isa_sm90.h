// isa_sm90.h on the host. It also checks that barriers are initialised and that their bytes add up, that TMA reads no
// shared memory that was written without a fence, and that the block waits for every wgmma and every store before it
// ends.
#pragma once

#include <deque>
#include <map>
#include <set>

#include "isa.h"

namespace mft::cuda::isa {

// -------------------------------------------------------------------------------------------------------- barriers

using TransactionBarrier = uint64_t;

namespace detail {

// The phase that a thread waits for, or waited for last. Phases are counted; -1 is the one before the first.
struct Waited {
  int64_t phase;
  bool waits;
};

struct BarrierState {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // expected but not yet arrived; negative if they arrive first
  int64_t completed = 0;  // phases
  bool published = false;
  std::string name;
  std::map<int, Waited> waited;  // key: rank and thread
};

struct ProductOperation {
  int columns;
  uint64_t descriptor;
  void (*execute)(ProductOperation&, const char* shared);
  uint64_t a_descriptor = 0;  // if A comes from shared memory
  bool adds = true;           // otherwise the sum begins here
  bool late = false;          // executed only when all threads wait for it
  float* d[128] = {};
  const Register* a[128] = {};
  int issued = 0, demanded = 0;  // numbers of threads
};

struct WarpGroup {
  std::deque<ProductOperation> operations;  // all operations of the launch, in order
  size_t done = 0;
  const char* shared = nullptr;

  // Execute, in order, the operations that are due.
  void advance() {
    for (; done < operations.size(); ++done) {
      ProductOperation& next = operations[done];
      if (next.issued < 128 || (next.late && next.demanded < 128)) return;
      next.execute(next, shared);
    }
  }
};

struct StoreGroup {
  int open = 0;  // stores that have not yet read their shared memory
};

struct ThreadState {
  size_t issued = 0, demanded = 0;          // products
  bool begun = false;                       // begin_products since the last commit
  std::vector<size_t> commits;              // `issued` at each commit
  std::vector<StoreGroup*> stores;          // committed
  StoreGroup* current = nullptr;
};

struct HopperState {
  std::map<const void*, BarrierState> barriers;
  std::map<std::pair<int, int>, WarpGroup> groups;     // key: rank, warpgroup
  std::map<std::pair<int, int>, ThreadState> threads;  // key: rank, thread
  std::map<const void*, int> unfenced;                 // 16-byte chunk of shared memory -> thread that wrote it
  std::deque<StoreGroup> store_groups;
  bool has_checks = false;
};

inline HopperState& state() {
  HopperState& s = emulator::cluster_state<HopperState>();
  if (!s.has_checks) {
    s.has_checks = true;
    emulator::at_end_of_cluster([&s] {
      for (const auto& [key, group] : s.groups) {
        for (const ProductOperation& operation : group.operations) {
          if (operation.demanded < 128) emulator::fault("a wgmma was never waited for");
        }
      }
      for (const auto& [key, barrier] : s.barriers) {
        const std::string bytes = std::to_string(barrier.bytes);
        if (barrier.bytes != 0) emulator::fault(barrier.name + " still expects " + bytes + " bytes");
      }
      for (const StoreGroup& group : s.store_groups) {
        if (group.open != 0) emulator::fault("a TMA store was never waited for");
      }
    });
  }
  return s;
}

inline ThreadState& thread_state() {
  const emulator::Thread& self = emulator::this_thread();
  return state().threads[{self.block->rank, self.index}];
}

inline int key_of_thread() {
  const emulator::Thread& self = emulator::this_thread();
  return self.block->rank << 16 | self.index;
}

inline std::string name_of_warp(int rank, int warp) {
  return "warp " + std::to_string(warp) + " of rank " + std::to_string(rank);
}

inline std::string warp_of_key(int key) { return name_of_warp(key >> 16, (key & 0xffff) / 32); }

// A test's name for the barrier at an offset in shared memory.
inline std::function<std::string(int64_t offset)> name_of_barrier = [](int64_t offset) {
  return "the barrier at shared offset " + std::to_string(offset);
};

inline BarrierState& barrier_of(HopperState& state, const void* b, const emulator::Block& block) {
  const auto found = state.barriers.find(b);
  if (found == state.barriers.end()) emulator::fault("a barrier is used before it is initialised");
  if (!found->second.published) emulator::fault(found->second.name + " is used before publish_barriers");
  if (block.unfinished == 0) emulator::fault("something arrives at " + found->second.name + ", whose block has ended");
  return found->second;
}

inline BarrierState& barrier_at(const void* b, int rank) {
  return barrier_of(state(), b, emulator::block_of_rank(rank));
}

inline void complete_if_due(BarrierState& b) {
  if (b.pending < 0) emulator::fault("more threads arrive at " + b.name + " than it counts");
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.completed;
  b.pending = b.count;
  for (const auto& [thread, waited] : b.waited) {
    if (waited.waits && b.completed > waited.phase + 1) {
      emulator::fault(b.name + " ends phase " + std::to_string(b.completed - 1) + " before " + warp_of_key(thread) +
                      ", which waits for phase " + std::to_string(waited.phase) + ", has seen it end");
    }
  }
}

// A parity only tells two neighbouring phases apart, so a thread must wait for every phase in order.
inline Waited& wait_for(BarrierState& b, uint32_t parity) {
  const auto [found, is_first] = b.waited.try_emplace(key_of_thread(), Waited{parity == 0 ? 0 : -1, false});
  Waited& waited = found->second;
  if ((waited.phase & 1) != parity) ++waited.phase;
  if (b.completed > waited.phase + 1) {
    emulator::fault(warp_of_key(found->first) + " waits for phase " + std::to_string(waited.phase) + " of " + b.name +
                    ", of which phase " + std::to_string(b.completed - 1) + " has ended: their parities are equal");
  }
  return waited;
}

inline char* at_rank(void* shared, int rank, int64_t bytes, int alignment, const char* what) {
  return emulator::block_of_rank(rank).shared + emulator::shared_offset(shared, bytes, alignment, what);
}

}  // namespace detail


inline void init_barrier(TransactionBarrier* b, int arrivals) {
  detail::BarrierState& barrier = detail::state().barriers[b];
  barrier = {};
  barrier.count = barrier.pending = arrivals;
  barrier.name = detail::name_of_barrier(emulator::shared_offset(b, 8, 8, "init_barrier")) + " of rank " +
                 std::to_string(rank_in_cluster());
}

inline void publish_barriers() {
  for (auto& [b, barrier] : detail::state().barriers) {
    const char* shared = emulator::this_thread().block->shared;
    const auto offset = static_cast<const char*>(b) - shared;
    if (offset >= 0 && offset < emulator::current_launch().shared_bytes) barrier.published = true;
  }
}

inline void arrive(TransactionBarrier* b, int rank) {
  detail::BarrierState& barrier = detail::barrier_at(detail::at_rank(b, rank, 8, 8, "arrive"), rank);
  --barrier.pending;
  detail::complete_if_due(barrier);
}

// The lane's registers identify the loads of its warp.
template <int kRows, int kColumns>
void arrive_after(const Register (&registers)[kRows][kColumns], TransactionBarrier* b, int rank) {
  if (lane() != 0) emulator::fault("arrive_after is for the first lane of a warp");
  for (const auto& row : registers) {
    for (const Register& r : row) {
      for (int i = 0; i < r.count; ++i) emulator::end_read(r.reads[i], 32);
    }
  }
  arrive(b, rank);
}

inline void arrive_expecting(TransactionBarrier* b, int bytes) {
  detail::BarrierState& barrier = detail::barrier_at(b, rank_in_cluster());
  barrier.bytes += bytes;
  --barrier.pending;
  detail::complete_if_due(barrier);
}

inline void expect(TransactionBarrier* b, int bytes) { detail::barrier_at(b, rank_in_cluster()).bytes += bytes; }

inline void wait(TransactionBarrier* b, uint32_t parity) {
  detail::BarrierState& barrier = detail::barrier_at(b, rank_in_cluster());
  detail::Waited& waited = detail::wait_for(barrier, parity);
  const std::string what = "phase " + std::to_string(waited.phase) + " of " + barrier.name;
  waited.waits = true;
  emulator::wait_until([&barrier, parity] { return uint32_t(barrier.completed & 1) != parity; }, what.c_str());
  waited.waits = false;
}

inline bool try_wait(TransactionBarrier* b, uint32_t parity) {
  detail::BarrierState& barrier = detail::barrier_at(b, rank_in_cluster());
  detail::wait_for(barrier, parity);
  return uint32_t(barrier.completed & 1) != parity;
}


// ----------------------------------------------------------------------------------------------------------- TMA

struct TensorMap {
  char* data = nullptr;
  int bytes = 0;
  int64_t rows = 0, columns = 0, row_bytes = 0;
  int box_rows = 0, box_columns = 0;
  int swizzle = 0;  // which bits of the number of a 128-byte row change the number of a chunk
};

// Return an error for what the driver refuses.
inline std::string make_tensor_map(TensorMap* map, const void* data, int bytes, int64_t rows, int64_t columns,
                                   int64_t row_bytes, int box_rows, int box_columns, Swizzle swizzle) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return "TMA: the address must be a multiple of 16";
  if (row_bytes % 16 != 0 || row_bytes >= int64_t{1} << 40) return "TMA: the stride must be a multiple of 16";
  if (rows < 1 || columns < 1 || rows > int64_t{1} << 32 || columns > int64_t{1} << 32) return "TMA: sizes";
  if (box_rows < 1 || box_rows > 256 || box_columns < 1 || box_columns > 256) return "TMA: boxes are 1 to 256";
  if (box_columns * bytes % 16 != 0) return "TMA: rows of a box must be multiples of 16 bytes";
  if (swizzle != Swizzle::kNone && box_columns * bytes > 128) return "TMA: swizzled rows are at most 128 bytes";
  *map = {static_cast<char*>(const_cast<void*>(data)), bytes, rows, columns, row_bytes, box_rows, box_columns,
          static_cast<int>(swizzle)};
  return "";
}

inline void prefetch(const TensorMap&) {}

namespace detail {

// Return the address of the 16-byte chunk in which TMA keeps (row, byte) of a box at `shared`. Bits 4 to 6 of the
// address within shared memory are XORed with bits 7 to 9.
inline char* chunk_of(char* block, char* shared, const TensorMap& map, int row, int byte) {
  int64_t offset = shared - block + static_cast<int64_t>(row) * map.box_columns * map.bytes + byte;
  offset ^= (offset >> 7 & map.swizzle) << 4;
  return block + offset;
}

template <class Visit>
void for_each_element(const TensorMap& map, char* block, char* shared, int column, int row, Visit visit) {
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const int64_t at_row = static_cast<int64_t>(row) + r, at_column = static_cast<int64_t>(column) + c;
      const bool inside = at_row >= 0 && at_row < map.rows && at_column >= 0 && at_column < map.columns;
      const int byte = c * map.bytes;
      char* here = chunk_of(block, shared, map, r, byte / 16 * 16) + byte % 16;
      const int64_t offset = at_row * map.row_bytes + at_column * map.bytes;
      visit(here, inside ? map.data + offset : nullptr);
    }
  }
}

}  // namespace detail

inline void load_tile_multicast(const TensorMap& map, TransactionBarrier* b, uint16_t ranks, void* shared, int column,
                                int row) {
  const int64_t bytes = static_cast<int64_t>(map.box_rows) * map.box_columns * map.bytes;
  const int alignment = 128 * (map.swizzle + 1);
  for (int rank = 0; rank < 16; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    char* barrier = detail::at_rank(b, rank, 8, 8, "the barrier of a load");
    char* target = detail::at_rank(shared, rank, bytes, alignment, "load_tile");
    const emulator::Block& owner = emulator::block_of_rank(rank);
    char* block = owner.shared;
    emulator::check_no_read(rank, target, bytes, "TMA loads");
    const TensorMap copy = map;
    emulator::defer([=, &owner, &state = detail::state()] {
      const int size = copy.bytes;
      detail::for_each_element(copy, block, target, column, row, [size](char* here, const char* element) {
        if (element != nullptr) {
          std::memcpy(here, element, static_cast<size_t>(size));
        } else {
          std::memset(here, 0, static_cast<size_t>(size));
        }
      });
      detail::BarrierState& arrived = detail::barrier_of(state, barrier, owner);
      arrived.bytes -= bytes;
      detail::complete_if_due(arrived);
    });
  }
}

inline void load_tile(const TensorMap& map, TransactionBarrier* b, void* shared, int column, int row) {
  load_tile_multicast(map, b, static_cast<uint16_t>(1 << rank_in_cluster()), shared, column, row);
}

inline void store_tile(const TensorMap& map, const void* shared, int column, int row) {
  const int64_t bytes = static_cast<int64_t>(map.box_rows) * map.box_columns * map.bytes;
  char* block = emulator::this_thread().block->shared;
  char* source = const_cast<char*>(static_cast<const char*>(shared));
  emulator::shared_offset(source, bytes, 128 * (map.swizzle + 1), "store_tile");
  detail::HopperState& state = detail::state();
  for (int64_t chunk = 0; chunk < bytes; chunk += 16) {
    if (state.unfenced.count(source + chunk) != 0) emulator::fault("TMA reads shared memory that no fence has shown it");
  }
  detail::ThreadState& self = detail::thread_state();
  if (self.current == nullptr) {
    state.store_groups.emplace_back();
    self.current = &state.store_groups.back();
  }
  ++self.current->open;
  emulator::defer([=, group = self.current, &owner = *emulator::this_thread().block] {
    if (owner.unfinished == 0) emulator::fault("TMA reads the shared memory of a block that has ended");
    const size_t size = static_cast<size_t>(map.bytes);
    detail::for_each_element(map, block, source, column, row, [size](const char* here, char* element) {
      if (element != nullptr) std::memcpy(element, here, size);
    });
    --group->open;
  });
}

inline void commit_stores() {
  detail::ThreadState& self = detail::thread_state();
  if (self.current == nullptr) {
    detail::state().store_groups.emplace_back();
    self.current = &detail::state().store_groups.back();
  }
  self.stores.push_back(self.current);
  self.current = nullptr;
}

template <int kPending>
void wait_stores_read() {
  const detail::ThreadState& self = detail::thread_state();
  const size_t due = self.stores.size() > kPending ? self.stores.size() - kPending : 0;
  emulator::wait_until(
      [&self, due] {
        return std::all_of(self.stores.begin(), self.stores.begin() + static_cast<std::ptrdiff_t>(due),
                           [](const detail::StoreGroup* group) { return group->open == 0; });
      },
      "TMA stores");
}

inline void fence_shared_for_tma() {
  const emulator::Thread& self = emulator::this_thread();
  auto& unfenced = detail::state().unfenced;
  const int key = self.block->rank << 16 | self.index;
  for (auto chunk = unfenced.begin(); chunk != unfenced.end();) {
    chunk = chunk->second == key ? unfenced.erase(chunk) : std::next(chunk);
  }
}

namespace detail {

template <bool kTransposed>
void store_matrices(const char* name, void* row, const uint32_t (&r)[4]) {
  struct Input {
    char* row;
    uint32_t r[4];
  };
  emulator::shared_offset(row, 16, 16, name);
  const Input input{static_cast<char*>(row), {r[0], r[1], r[2], r[3]}};
  emulator::collective(name, &input, nullptr, [](const void* const* in, void* const*) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int half = 0; half < 2; ++half) {
          // The lane holds (lane / 4, 2 (lane % 4) + half) of the matrix.
          const int down = lane / 4, right = lane % 4 * 2 + half;
          const int at_row = kTransposed ? right : down, at_column = kTransposed ? down : right;
          const auto element = static_cast<uint16_t>(static_cast<const Input*>(in[lane])->r[matrix] >> (16 * half));
          std::memcpy(static_cast<const Input*>(in[8 * matrix + at_row])->row + 2 * at_column, &element, 2);
        }
      }
    }
  });
  state().unfenced[row] = key_of_thread();
}

}  // namespace detail

inline void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
  detail::store_matrices<true>("store_matrices_transposed", row, r);
}

// --------------------------------------------------------------------------------------------------------- wgmma

inline uint64_t descriptor(const void* shared) {
  const auto offset = static_cast<uint64_t>(emulator::shared_offset(shared, 16, 16, "descriptor"));
  return offset >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

template <class Value, int kCount>
void fence_registers(Value (&)[kCount]) {}

inline void begin_products() { detail::thread_state().begun = true; }

namespace detail {

inline WarpGroup& warp_group() {
  const emulator::Thread& self = emulator::this_thread();
  WarpGroup& group = state().groups[{self.block->rank, self.index / 128}];
  group.shared = self.block->shared;
  return group;
}

// B (n, k) of a tile in the descriptor's layout: rows of 128 bytes, groups of 8 rows stride_bytes apart, and 16-byte
// chunks swizzled by the address.
inline uint16_t element_of(const char* block, uint64_t descriptor, int n, int k) {
  const auto start = static_cast<int64_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<int64_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) emulator::fault("only the 128-byte swizzle is emulated");
  int64_t offset = start + n / 8 * stride + n % 8 * 128 + k * 2;
  offset ^= (offset >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, block + offset, 2);
  return bits;
}

template <class T>
void execute(ProductOperation& operation, const char* block) {
  const int columns = operation.columns;
  std::vector<float> b(static_cast<size_t>(columns) * 16);
  for (int n = 0; n < columns; ++n) {
    for (int k = 0; k < 16; ++k) b[static_cast<size_t>(16 * n + k)] = widen(T{element_of(block, operation.descriptor, n, k)});
  }
  float a[64][16];
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[t / 32 * 16 + t % 32 / 4 + i % 2 * 8][t % 4 * 2 + i / 2 * 8 + half] = half_of<T>(operation.a[t][i].bits, half);
      }
    }
  }
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < columns / 2; ++i) {
      const float* row = a[t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8];
      const float* column = &b[static_cast<size_t>(16 * (i / 4 * 8 + t % 4 * 2 + i % 2))];
      float sum = operation.d[t][i];
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      operation.d[t][i] = sum;
    }
  }
}

}  // namespace detail

namespace detail {

// End this lane's part of the reads that the registers come from, once for each read.
inline void end_reads(const Register* registers, int count) {
  std::set<int> reads;
  for (int i = 0; i < count; ++i) reads.insert(registers[i].reads, registers[i].reads + registers[i].count);
  for (const int read : reads) emulator::end_read(read, 1);
}

// Issue the thread's share of the product: its accumulators, and A if it comes from registers.
inline void issue_product(ProductOperation asked, float* d, const Register* a) {
  WarpGroup& group = warp_group();
  ThreadState& self = thread_state();
  if (!self.begun) emulator::fault("a wgmma without begin_products since the last commit");
  if (self.issued == group.operations.size()) {
    asked.late = emulator::asynchrony() == emulator::Asynchrony::kAsLateAsPossible ||
                 (emulator::asynchrony() == emulator::Asynchrony::kRandom && emulator::random_numbers()() % 2 == 0);
    group.operations.push_back(asked);
  }
  ProductOperation& operation = group.operations[self.issued++];
  if (operation.columns != asked.columns || operation.descriptor != asked.descriptor ||
      operation.a_descriptor != asked.a_descriptor || operation.adds != asked.adds) {
    emulator::fault("warps of a warpgroup disagree on a wgmma");
  }
  operation.d[thread() % 128] = d;
  operation.a[thread() % 128] = a;
  if (a != nullptr) end_reads(a, 4);
  ++operation.issued;
  group.advance();
}

}  // namespace detail

template <class T, int kN>
void product(float (&d)[kN / 2], const Register (&a)[4], uint64_t b) {
  detail::issue_product({kN, b, &detail::execute<T>}, d, a);
}

inline void commit_products() {
  detail::ThreadState& self = detail::thread_state();
  self.commits.push_back(self.issued);
  self.begun = false;
}

template <int kPending>
void wait_products() {
  detail::WarpGroup& group = detail::warp_group();
  detail::ThreadState& self = detail::thread_state();
  const size_t due = self.commits.size() > kPending ? self.commits[self.commits.size() - 1 - kPending] : 0;
  for (; self.demanded < due; ++self.demanded) ++group.operations[self.demanded].demanded;
  emulator::wait_until(
      [&group, due] {
        group.advance();
        return group.done >= due;
      },
      "wgmma");
}

template <int kCount>
void claim_registers() {}

template <int kCount>
void give_registers() {}

}  // namespace mft::cuda::isa
