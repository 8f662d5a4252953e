// What the epilogue's load warp and the warpgroups of score_grad_sm90 ask of their pipeline, in every order in which they
// can be scheduled: does each block come to its end, with each tile asked for after the one before it is stored?
//
// load() and store() of score_prefetch_sm90.h run as they are, on a pipeline that writes down what they call; then all
// interleavings are walked through against barriers as CUTLASS's PipelineTransactionAsync has them. A barrier of n
// arrivals counts phases; wait(p) passes unless the parity of the phase that is open is p (PTX, mbarrier.try_wait.parity),
// so a phase that is two behind looks like one that has not come.
#include "cuda_on_host.h"

#include <cutlass/pipeline/sm90_pipeline.hpp>

#include <cstdio>
#include <map>
#include <set>
#include <vector>

#include "score_prefetch_sm90.h"

namespace {

enum class Does { kAcquire, kCommit, kWait, kRelease };

struct Step {
  Does what;
  uint32_t stage, parity;
  int tile;
};

std::vector<Step>* written = nullptr;
int tile_now = 0;

template <uint32_t kStages>
struct Writer {
  static constexpr uint32_t Stages = kStages;
  using State = cutlass::PipelineState<kStages>;
  void write(Does what, State state) { written->push_back({what, uint32_t(state.index()), state.phase(), tile_now}); }
  void producer_acquire(State state) { write(Does::kAcquire, state); }
  void producer_commit(State state) { write(Does::kCommit, state); }
  void consumer_wait(State state) { write(Does::kWait, state); }
  void consumer_release(State state) { write(Does::kRelease, state); }
};

struct Inputs {
  const uint16_t* weight = nullptr;
  int64_t weight_stride = 0, d_scores_stride = 0, sign_stride = 0;
  const float* d_scores = nullptr;
  const void* signs = nullptr;
  mft::cuda::SignSource source = mft::cuda::SignSource::kOne;
};

// An epilogue without source, which leaves its load pipeline alone.
template <uint32_t kStages>
struct Silent {
  using LoadPipeline = Writer<kStages>;
  using LoadPipelineState = cutlass::PipelineState<kStages>;
  struct Params {
    Inputs thread;
  };
  struct StorePipeline {};
  struct StorePipelineState {};
  struct TensorStorage {};
  Silent(const Params&, TensorStorage&) {}
  auto store(LoadPipeline, LoadPipelineState load, StorePipeline, StorePipelineState store) {
    return cute::make_tuple(load, store);
  }
};

constexpr int kGroups = 2;  // warpgroups that multiply

struct Found {
  bool ends = true, in_time = true;
};

// Every state that the load warp and the warpgroups can come to.
Found walk(const std::vector<Step>& load, const std::vector<Step>& store) {
  using At = std::vector<size_t>;  // the load warp's place, then each group's
  std::set<At> seen;
  std::vector<At> open{At(1 + kGroups, 0)};
  Found found;
  while (!open.empty()) {
    const At at = open.back();
    open.pop_back();
    if (!seen.insert(at).second) continue;
    std::map<uint32_t, int> full, empty;  // phases of each stage that have ended
    for (size_t i = 0; i < at[0]; ++i) full[load[i].stage] += load[i].what == Does::kCommit;
    for (int g = 1; g <= kGroups; ++g) {
      for (size_t i = 0; i < at[g]; ++i) empty[store[i].stage] += store[i].what == Does::kRelease;
    }
    bool moved = false, done = true;
    for (int actor = 0; actor <= kGroups; ++actor) {
      const std::vector<Step>& steps = actor == 0 ? load : store;
      if (at[actor] == steps.size()) continue;
      done = false;
      const Step& step = steps[at[actor]];
      const int ended = step.what == Does::kAcquire ? empty[step.stage] / kGroups : full[step.stage];
      const bool waits = step.what == Does::kAcquire || step.what == Does::kWait;
      if (waits && uint32_t(ended % 2) == step.parity) continue;
      if (step.what == Does::kAcquire && ended < step.tile) found.in_time = false;
      moved = true;
      At next = at;
      ++next[actor];
      open.push_back(next);
    }
    if (!moved && !done) found.ends = false;
  }
  return found;
}

template <uint32_t kStages>
int check(int tiles) {
  using Epilogue = mft::cuda::PrefetchingEpilogue<Silent<kStages>>;
  using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
  typename Epilogue::Params params;
  typename Epilogue::TensorStorage storage;
  Epilogue epilogue(params, storage);
  std::vector<Step> load, store;
  Writer<kStages> pipeline;

  written = &load;
  auto producer = cutlass::make_producer_start_state<Writer<kStages>>();
  const auto nothing = cute::make_shape(0, 0, 0, 1);  // no line to prefetch
  for (tile_now = 0; tile_now < tiles; ++tile_now) {
    producer = epilogue.load(pipeline, producer, nothing, Tile{}, cute::make_coord(0, 0, 0, 0));
  }
  for (uint32_t s = 0; s < kStages; ++s, ++producer) pipeline.producer_acquire(producer);  // CUTLASS's load_tail

  written = &store;
  typename Epilogue::LoadPipelineState consumer;
  for (tile_now = 0; tile_now < tiles; ++tile_now) {
    consumer = cute::get<0>(epilogue.store(pipeline, consumer, typename Epilogue::StorePipeline{},
                                           typename Epilogue::StorePipelineState{}));
  }

  const Found found = walk(load, store);
  if (!found.ends) std::printf("%u stages, %d tiles a block: the load warp can wait for ever\n", kStages, tiles);
  if (!found.in_time) std::printf("%u stages, %d tiles a block: a tile is asked for too early\n", kStages, tiles);
  return !found.ends + !found.in_time;
}

}  // namespace

int main() {
  int faults = 0;
  for (int tiles = 1; tiles <= 4; ++tiles) faults += check<1>(tiles) + check<2>(tiles) + check<4>(tiles);
  return faults != 0;
}
