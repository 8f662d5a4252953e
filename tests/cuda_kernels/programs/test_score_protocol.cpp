// The calls of the epilogue's load warp and of the warpgroups of score_grad_sm90 on their pipeline, in every order in
// which they can be scheduled. Does each block end? Is each tile requested only after the tile before it is stored?
//
// load() and store() of score_prefetch_sm90.h run unchanged, on a pipeline that records their calls. Then the test
// walks through all interleavings, with barriers as in CUTLASS's PipelineTransactionAsync. A barrier of n arrivals
// counts phases. wait(p) passes unless p is the parity of the open phase (PTX, mbarrier.try_wait.parity), so a phase
// that is two behind looks like one that has not come.
//
// The test also checks what load() prefetches: all inputs that exist, and nothing else.
#include "cuda_on_host.h"

void prefetched(const void* place);
#define MFT_PREFETCHED prefetched

#include <cutlass/pipeline/sm90_pipeline.hpp>

#include <algorithm>
#include <cstdio>
#include <iterator>
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
std::vector<const void*> places;  // prefetched addresses
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

// An epilogue without a source, which does not touch its load pipeline.
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

// Visit every state that the load warp and the warpgroups can reach.
Found walk(const std::vector<Step>& load, const std::vector<Step>& store) {
  using At = std::vector<size_t>;  // the load warp's position, then each group's
  std::set<At> seen;
  std::vector<At> open{At(1 + kGroups, 0)};
  Found found;
  while (!open.empty()) {
    const At at = open.back();
    open.pop_back();
    if (!seen.insert(at).second) continue;
    std::map<uint32_t, int> full, empty;  // finished phases of each stage
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

// Only lane 0 prefetches, the only lane on the host, for a tile that extends beyond the matrices.
int check_prefetched(bool weighted, bool added, mft::cuda::SignSource source) {
  using Epilogue = mft::cuda::PrefetchingEpilogue<Silent<1>>;
  constexpr int kRows = 100, kColumns = 200, kStride = 208;
  static uint16_t weight[kRows * kStride];
  static float d_scores[kRows * kStride], signs[kRows * kStride];  // large enough for bits and 16-bit scores too
  typename Epilogue::Params params;
  params.thread.weight = weighted ? weight : nullptr;
  params.thread.d_scores = added ? d_scores : nullptr;
  params.thread.signs = signs, params.thread.source = source;
  params.thread.weight_stride = params.thread.d_scores_stride = params.thread.sign_stride = kStride;
  typename Epilogue::TensorStorage storage;
  Epilogue epilogue(params, storage);
  std::vector<Step> steps;
  written = &steps, places.clear();
  epilogue.load(Writer<1>{}, cutlass::make_producer_start_state<Writer<1>>(), cute::make_shape(kRows, kColumns, 0, 1),
                cute::Shape<cute::_128, cute::_256, cute::_64>{}, cute::make_coord(0, 0, 0, 0));
  const auto within = [](auto& matrix) {
    return std::count_if(places.begin(), places.end(), [&matrix](const void* place) {
      return place >= std::begin(matrix) && place < std::end(matrix);
    });
  };
  const auto of_weight = within(weight), of_d_scores = within(d_scores), of_signs = within(signs);
  const bool right = (of_weight > 0) == weighted && (of_d_scores > 0) == added &&
                     (of_signs > 0) == (source != mft::cuda::SignSource::kOne) &&
                     of_weight + of_d_scores + of_signs == static_cast<long>(places.size());
  if (!right) {
    std::printf("prefetched: %ld lines of weight (%s), %ld of d_scores (%s), %ld of signs (%d), of %zu\n", of_weight,
                weighted ? "given" : "none", of_d_scores, added ? "given" : "none", of_signs, static_cast<int>(source),
                places.size());
  }
  return !right;
}

}  // namespace

void prefetched(const void* place) { places.push_back(place); }

int main() {
  int faults = 0;
  for (const bool weighted : {true, false}) {
    for (const bool added : {true, false}) {
      for (int source = 0; source < 4; ++source) {
        faults += check_prefetched(weighted, added, static_cast<mft::cuda::SignSource>(source));
      }
    }
  }
  for (int tiles = 1; tiles <= 4; ++tiles) faults += check<1>(tiles) + check<2>(tiles) + check<4>(tiles);
  return faults != 0;
}
