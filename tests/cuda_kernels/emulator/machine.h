// A GPU on the host, which executes kernels without changes. Every thread of a cluster is a fibre. A scheduler runs one
// warp after another in a random order from a seed: in turn, or as far ahead of the others as its waits permit. Work
// that the hardware does in the background (TMA, wgmma, cp.async) happens at issue, as late as the kernel's waits
// permit, or in between, so that a missing wait or fence gives wrong results or an error. Clusters run one after
// another, in a random order: kernels that wait for another cluster do not end.
//
// A fault (a deadlock, a bad address, a warp whose lanes disagree) ends the launch with a text.
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

// Which warp runs next. kByRank runs the first warp of an order that can continue, so that it may run far ahead of the
// others. The order is random; now and then (in some launches never) the warp that ran moves to its end. Background
// work at random has a rank too.
enum class Schedule { kInTurn, kByRank };

struct Settings {
  unsigned seed = 0;
  Asynchrony asynchrony = Asynchrony::kRandom;
  int shared_limit = 227 * 1024;  // bytes that a block may have; the limit of sm_90
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

// The properties of a kernel that a launch needs.
struct Launch {
  int64_t grid[3];
  int cluster, threads, shared_bytes;
  std::function<void()> body;  // one thread
};

// Run the whole grid. Return "" or the fault.
std::string run(const Launch&, const Settings&);

// ------------------------------------------------------------------------------- for the instructions (isa.h)

Thread& this_thread();
Block& block_of_rank(int rank);  // in the same cluster
int cluster_size();
const Launch& current_launch();
std::mt19937& random_numbers();
Asynchrony asynchrony();

// Let other threads run until ready() holds.
void wait_until(const std::function<bool()>& ready, const char* what);

// Do the work at some later time: at once, at random, or when nothing else can continue.
void defer(std::function<void()> work);

// All 32 lanes bring an input and receive an output; compute(inputs, outputs) runs once all lanes have arrived.
void collective(const char* operation, const void* input, void* output,
                const std::function<void(const void* const* inputs, void* const* outputs)>& compute);

void sync(Barrier&, int threads, const char* what);

// Return the offset of a pointer into the block's shared memory. It is a fault if [p, p + bytes) is not inside or not
// aligned.
int64_t shared_offset(const void* p, int64_t bytes, int alignment, const char* what);

[[noreturn]] void fault(const std::string& text);

// The settings of later launches.
void set_settings(const Settings&);
const Settings& settings();

// State that an instruction set keeps for a cluster: created at first use, dropped after the cluster.
std::shared_ptr<void>& cluster_state(const std::type_info& type);

template <class State>
State& cluster_state() {
  std::shared_ptr<void>& state = cluster_state(typeid(State));
  if (!state) state = std::make_shared<State>();
  return *static_cast<State*>(state.get());
}

// Run `check` when all threads of the cluster are done, to find what was left open.
void at_end_of_cluster(std::function<void()> check);

}  // namespace mft::cuda::emulator
