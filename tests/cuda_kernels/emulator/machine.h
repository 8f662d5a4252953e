// A GPU on the host, to execute kernels as they are: every thread of a cluster is a fibre, and a scheduler runs warp
// after warp in a random order, seeded, in turn or as far ahead of the others as its waits permit. What the hardware
// does in the background (TMA, wgmma, cp.async) happens at issue, as late as the kernel's waits permit, or in between,
// so that a missing wait or fence gives wrong results or an error. Clusters run one after another, in a random order:
// kernels that wait for another cluster do not end.
//
// A fault (deadlock, a bad address, a warp whose lanes disagree) ends the launch with a text.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <vector>

namespace mft::cuda::emulator {

// When background work happens.
enum class Asynchrony { kAtIssue, kAsLateAsPossible, kRandom };

// Which warp runs next. By rank, the first that can go on does, so that it may run far ahead of the others: the order
// is random, and now and then (in some launches never) the one that ran becomes the last of it. Background work at
// random has a rank too.
enum class Schedule { kInTurn, kByRank };

struct Settings {
  unsigned seed = 0;
  Asynchrony asynchrony = Asynchrony::kRandom;
  int shared_limit = 227 * 1024;  // bytes that a block may have; sm_90's
  Schedule schedule = Schedule::kInTurn;
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Warp {
  const void* inputs[32];
  void* outputs[32];
  const char* operation = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
};

// A named barrier: bar.sync.
struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Block {
  int64_t index[3];
  int rank = 0;  // in its cluster
  char* shared = nullptr;
  int shared_bytes = 0;
  std::vector<Warp> warps;
  Barrier barriers[16];
  int unfinished = 0;
};

struct Thread {
  int index = 0;  // in its block
  Block* block = nullptr;
  std::vector<std::function<void()>> copies;               // cp.async not yet committed
  std::vector<std::vector<std::function<void()>>> groups;  // committed, not yet done
  const std::function<bool()>* ready = nullptr;
  const char* waits_for = "";
  bool finished = false;
};

// What a launch needs to know of a kernel.
struct Launch {
  int64_t grid[3];
  int cluster, threads, shared_bytes;
  std::function<void()> body;  // one thread
};

// Runs the whole grid. Returns "" or the fault.
std::string run(const Launch&, const Settings&);

// ------------------------------------------------------------------------------- for the instructions (isa.h)

Thread& this_thread();
Block& block_of_rank(int rank);  // in the same cluster
int cluster_size();
const Launch& current_launch();
std::mt19937& random_numbers();
Asynchrony asynchrony();

// Lets others run until ready() holds.
void wait_until(const std::function<bool()>& ready, const char* what);

// Work that happens some time later: at once, at random, or when nothing else can go on.
void defer(std::function<void()> work);

// All 32 lanes bring an input and receive an output; compute(inputs, outputs) runs once all have come.
void collective(const char* operation, const void* input, void* output,
                const std::function<void(const void* const* inputs, void* const* outputs)>& compute);

void sync(Barrier&, int threads, const char* what);

// The offset of a pointer into the block's shared memory; a fault if [p, p + bytes) is not inside or not aligned.
int64_t shared_offset(const void* p, int64_t bytes, int alignment, const char* what);

[[noreturn]] void fault(const std::string& text);

// The settings of launches from here on.
void set_settings(const Settings&);
const Settings& settings();

// State that an instruction set keeps for a cluster: made on first use, dropped after the cluster.
std::shared_ptr<void>& cluster_state(const std::type_info& type);

template <class State>
State& cluster_state() {
  std::shared_ptr<void>& state = cluster_state(typeid(State));
  if (!state) state = std::make_shared<State>();
  return *static_cast<State*>(state.get());
}

// Run when all threads of the cluster are done, to look for what was left open.
void at_end_of_cluster(std::function<void()> check);

}  // namespace mft::cuda::emulator
