// The scheduler: fibres by ucontext. setjmp and longjmp switch them; they keep the signal mask, so need no system call.
#include "machine.h"

#include <csetjmp>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <typeindex>
#include <unordered_map>

#undef _FORTIFY_SOURCE  // its longjmp refuses to switch from one stack to another

namespace mft::cuda::emulator {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kSharedAlignment = 1024;
constexpr int kCanary = 4096;  // bytes behind the shared memory of a block

// A stack and its position. It is kept for the next cluster, because a new one takes two system calls. idle: the last
// thread on it has ended, and the next thread can use it. The lowest page is a guard.
struct Context {
  char* stack;
  jmp_buf place;
  bool idle = false;
};

struct Fibre {
  Thread thread;
  Context* context = nullptr;
  bool started = false;
};

struct Cluster {
  const Launch* launch;
  std::mt19937 random;
  Asynchrony asynchrony;
  Schedule schedule;
  std::vector<Block> blocks;
  std::vector<Fibre> fibres;  // block after block
  std::vector<std::function<void()>> deferred;
  std::vector<std::function<void()>> checks;
  std::unordered_map<std::type_index, std::shared_ptr<void>> states;
  jmp_buf scheduler;
  Fibre* running = nullptr;
  std::string fault;
};

Cluster* cluster = nullptr;
Settings current_settings;

Context& context_of(size_t fibre) {
  static std::deque<Context> contexts;
  while (contexts.size() <= fibre) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);
    contexts.emplace_back().stack = static_cast<char*>(memory);
  }
  return contexts[fibre];
}

void leave() { _longjmp(cluster->scheduler, 1); }

void run_thread(Thread& thread) {
  try {
    cluster->launch->body();
  } catch (const std::exception& error) {
    if (cluster->fault.empty()) {
      cluster->fault = "thread " + std::to_string(thread.index) + " of block " + std::to_string(thread.block->index[0]) +
                       ": " + error.what();
    }
  }
  thread.finished = true;
  --thread.block->unfinished;
}

// Run thread after thread, each of another cluster. After a fault most threads stop in the middle, and their stacks are
// set up again.
void body_of_context() {
  for (;;) {
    Fibre& self = *cluster->running;
    run_thread(self.thread);
    self.context->idle = true;
    if (_setjmp(self.context->place) == 0) leave();
  }
}

void resume(Fibre& fibre) {
  Context& context = *fibre.context;
  cluster->running = &fibre;
  if (_setjmp(cluster->scheduler) == 0) {
    const bool goes_on = fibre.started || context.idle;
    fibre.started = true;
    context.idle = false;
    if (goes_on) _longjmp(context.place, 1);
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = context.stack;
    start.uc_stack.ss_size = kStack;
    start.uc_link = nullptr;
    makecontext(&start, body_of_context, 0);
    setcontext(&start);
  }
  cluster->running = nullptr;
}

bool can_run(const Fibre& fibre) {
  return !fibre.thread.finished && (fibre.thread.ready == nullptr || (*fibre.thread.ready)());
}

void complete_one() {
  const size_t i = cluster->random() % cluster->deferred.size();
  const std::function<void()> work = std::move(cluster->deferred[i]);
  cluster->deferred.erase(cluster->deferred.begin() + static_cast<std::ptrdiff_t>(i));
  work();
}

std::string describe_deadlock() {
  std::string text = "deadlock:";
  for (const Block& block : cluster->blocks) {
    std::string last;
    for (const Fibre& fibre : cluster->fibres) {
      const Thread& t = fibre.thread;
      if (t.block != &block) continue;
      const std::string now = t.finished ? "has ended" : std::string("waits for ") + t.waits_for;
      if (now != last) text += " [block " + std::to_string(block.rank) + ", thread " + std::to_string(t.index) + " on] " + now + ";";
      last = now;
    }
  }
  return text;
}

// Run the warp; return whether one of its threads could run.
bool run_warp(size_t warp) {
  bool ran = false;
  for (size_t f = 32 * warp; f < 32 * warp + 32 && cluster->fault.empty(); ++f) {
    Fibre& fibre = cluster->fibres[f];
    if (!can_run(fibre)) continue;
    resume(fibre);
    ran = true;
  }
  return ran;
}

bool can_complete() { return cluster->asynchrony == Asynchrony::kRandom && !cluster->deferred.empty(); }

// Return whether anything happened.
bool run_in_turn(std::vector<size_t>& warps) {
  bool progress = false;
  std::shuffle(warps.begin(), warps.end(), cluster->random);
  for (const size_t w : warps) {
    progress = run_warp(w) || progress;
    if (!can_complete() || cluster->random() % 4 != 0) continue;
    complete_one();
    progress = true;
  }
  return progress;
}

// The number after the last warp's stands for background work.
bool run_by_rank(std::vector<size_t>& order, unsigned rarity) {
  const size_t background = order.size() - 1;
  for (auto next = order.begin(); next != order.end(); ++next) {
    if (*next == background && can_complete()) {
      complete_one();
    } else if (*next == background || !run_warp(*next)) {
      continue;
    }
    if (rarity != 0 && cluster->random() % rarity == 0) std::rotate(next, next + 1, order.end());
    return true;
  }
  return false;
}

void run_threads() {
  const bool in_turn = cluster->schedule == Schedule::kInTurn;
  std::vector<size_t> order(cluster->fibres.size() / 32 + (in_turn ? 0 : 1));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), cluster->random);
  const unsigned rarities[] = {0, 8, 64, 512}, rarity = rarities[cluster->random() % 4];
  const auto unfinished = [] {
    return std::any_of(cluster->blocks.begin(), cluster->blocks.end(), [](const Block& b) { return b.unfinished != 0; });
  };
  while (unfinished() && cluster->fault.empty()) {
    if (in_turn ? run_in_turn(order) : run_by_rank(order, rarity)) continue;
    if (!cluster->fault.empty() || !unfinished()) break;
    if (cluster->deferred.empty()) {
      cluster->fault = describe_deadlock();
    } else {
      complete_one();
    }
  }
  while (cluster->fault.empty() && !cluster->deferred.empty()) complete_one();
}

std::string run_cluster(const Launch& launch, const Settings& settings, int64_t x, int64_t y, int64_t z) {
  Cluster state;
  state.launch = &launch;
  state.random.seed(settings.seed + static_cast<unsigned>(x * 7919 + y * 104729 + z));
  state.asynchrony = settings.asynchrony;
  state.schedule = settings.schedule;
  cluster = &state;
  const int bytes = launch.shared_bytes, room = (bytes + kCanary + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  std::vector<char> memory(static_cast<size_t>(room) * launch.cluster + kSharedAlignment, static_cast<char>(0xff));
  char* base = memory.data() + kSharedAlignment - reinterpret_cast<uintptr_t>(memory.data()) % kSharedAlignment;
  state.blocks.resize(static_cast<size_t>(launch.cluster));
  state.fibres.resize(static_cast<size_t>(launch.cluster) * static_cast<size_t>(launch.threads));
  size_t next = 0;
  for (int rank = 0; rank < launch.cluster; ++rank) {
    Block& block = state.blocks[static_cast<size_t>(rank)];
    block.index[0] = x + rank, block.index[1] = y, block.index[2] = z;
    block.rank = rank;
    block.shared = base + static_cast<ptrdiff_t>(room) * rank;  // 0xff bytes are NaN until something is written
    block.shared_bytes = bytes;
    block.warps.resize(static_cast<size_t>(launch.threads / 32));
    block.unfinished = launch.threads;
    for (int t = 0; t < launch.threads; ++t, ++next) {
      state.fibres[next].thread.index = t;
      state.fibres[next].thread.block = &block;
      state.fibres[next].context = &context_of(next);
    }
  }
  try {
    run_threads();
    if (state.fault.empty()) {
      for (const auto& check : state.checks) check();
    }
  } catch (const std::exception& error) {  // from background work or a check
    state.fault = error.what();
  }
  for (const Block& block : state.blocks) {
    for (int i = 0; i < kCanary && state.fault.empty(); ++i) {
      if (block.shared[bytes + i] != static_cast<char>(0xff)) state.fault = "wrote behind the shared memory";
    }
  }
  cluster = nullptr;
  return state.fault;
}

}  // namespace

std::string run(const Launch& launch, const Settings& settings) {
  if (launch.threads % 32 != 0) return "threads must be whole warps";
  if (launch.grid[0] % launch.cluster != 0) return "blocks along x must be whole clusters";
  if (launch.shared_bytes > settings.shared_limit) return "more shared memory than the device has for a block";
  std::vector<int64_t> order(static_cast<size_t>(launch.grid[0] / launch.cluster * launch.grid[1] * launch.grid[2]));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(settings.seed);
  std::shuffle(order.begin(), order.end(), random);
  for (const int64_t i : order) {
    const int64_t clusters = launch.grid[0] / launch.cluster;
    const int64_t x = i % clusters * launch.cluster, y = i / clusters % launch.grid[1], z = i / clusters / launch.grid[1];
    const std::string fault = run_cluster(launch, settings, x, y, z);
    if (!fault.empty()) return fault;
  }
  return "";
}

Thread& this_thread() { return cluster->running->thread; }
Block& block_of_rank(int rank) {
  if (rank < 0 || rank >= cluster->launch->cluster) fault("there is no block of rank " + std::to_string(rank));
  return cluster->blocks[static_cast<size_t>(rank)];
}
int cluster_size() { return cluster->launch->cluster; }
const Launch& current_launch() { return *cluster->launch; }
std::mt19937& random_numbers() { return cluster->random; }
Asynchrony asynchrony() { return cluster->asynchrony; }

// Committed copies may land at any time, also before a thread waits for them.
void land_copies(Thread& thread) {
  if (cluster->asynchrony != Asynchrony::kRandom || cluster->random() % 8 != 0) return;
  for (auto& group : thread.groups) {
    for (const auto& copy : group) copy();
    group.clear();  // the empty group still counts until a wait
    if (cluster->random() % 2 == 0) return;
  }
}

void wait_until(const std::function<bool()>& ready, const char* what) {
  Fibre& self = *cluster->running;
  land_copies(self.thread);
  // Now and then other threads go first, although this one need not wait.
  if (ready() && cluster->random() % 8 != 0) return;
  self.thread.ready = &ready;
  self.thread.waits_for = what;
  if (_setjmp(self.context->place) == 0) leave();
  self.thread.ready = nullptr;
}

void defer(std::function<void()> work) {
  if (cluster->asynchrony == Asynchrony::kAtIssue) {
    work();
  } else {
    cluster->deferred.push_back(std::move(work));
  }
}

void collective(const char* operation, const void* input, void* output,
                const std::function<void(const void* const*, void* const*)>& compute) {
  Thread& self = this_thread();
  Warp& warp = self.block->warps[static_cast<size_t>(self.index / 32)];
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (warp.operation != operation && std::strcmp(warp.operation, operation) != 0) {
    fault(std::string("lanes of a warp disagree: ") + operation + " against " + warp.operation);
  }
  warp.inputs[self.index % 32] = input;
  warp.outputs[self.index % 32] = output;
  if (++warp.arrived == 32) {
    compute(warp.inputs, warp.outputs);
    warp.arrived = 0;
    ++warp.generation;
    return;
  }
  const uint64_t now = warp.generation;
  wait_until([&warp, now] { return warp.generation != now; }, operation);
}

void sync(Barrier& barrier, int threads, const char* what) {
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  const uint64_t now = barrier.generation;
  wait_until([&barrier, now] { return barrier.generation != now; }, what);
}

int64_t shared_offset(const void* p, int64_t bytes, int alignment, const char* what) {
  const Block& block = *this_thread().block;
  const int64_t offset = static_cast<const char*>(p) - block.shared;
  if (offset < 0 || offset + bytes > block.shared_bytes) {
    fault(std::string(what) + " of " + std::to_string(bytes) + " bytes at shared offset " + std::to_string(offset) +
          " leaves the " + std::to_string(block.shared_bytes) + " bytes of the block");
  }
  if (offset % alignment != 0) {
    fault(std::string(what) + " at shared offset " + std::to_string(offset) + " is not aligned to " +
          std::to_string(alignment));
  }
  return offset;
}

void fault(const std::string& text) { throw Fault(text); }

void set_settings(const Settings& settings) { current_settings = settings; }
const Settings& settings() { return current_settings; }

std::shared_ptr<void>& cluster_state(const std::type_info& type) { return cluster->states[std::type_index(type)]; }
void at_end_of_cluster(std::function<void()> check) { cluster->checks.push_back(std::move(check)); }

}  // namespace mft::cuda::emulator
