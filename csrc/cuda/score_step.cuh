// One AdamW step on scores and moments in one pass over memory. The next threshold comes from counts of that pass.
//
// The flattened matrix is divided into chunks of 1024, and a chunk into four blocks of 256. In the 8-bit scheme each
// block has its own scale. A pair of warps takes a chunk and walks its blocks:
//
//    chunk  | block 0 | block 1 | block 2 | block 3 |   a thread makes the words of 4 Philox counters once, and uses
//           | word 0  | word 1  | word 2  | word 3  |   them for 4 neighbours of each block
//
// So a thread loads 16 bytes of fp32, 8 of 16-bit types and 4 of codes at a time. The largest moments of a block give
// its scales. The two warps exchange them through shared memory, in two buffers by turns: one barrier per block.
//
// 16-bit scores that come with their old threshold are counted in the same pass: how often each new key in a window
// around the old threshold occurs, and how many keys lie above the window.
//
//    keys   |  below: not counted  |<- 512 ->|<- 512 ->|  above: one count  |  not finite: one count  |
//                                  start    old threshold
//
// WindowKernel reads the new threshold from the counts. If the threshold lies outside the window, that kernel sets a
// flag. SelectKernel (select.cuh) is always launched, but reads the scores again only if the flag is set. So the host
// does not wait.
//
// mft_kernels/reference/step.py defines formats and arithmetic, and the bits are the same, with one exception: its
// square root is torch's, which on a CPU is not rounded correctly. Every product and sum is rounded by itself, except
// where torch's kernels fuse them. Speed: not measured on a GPU.
#pragma once

#include <type_traits>

#include "keys.h"
#include "philox.h"
#include "score_format.h"

namespace mft::cuda {

constexpr int kStepBlock = 256, kStepChunk = 4 * kStepBlock;
// 512 steps either way: 0.002 in fixed point, four octaves in bf16. No usual step moves a threshold that far.
constexpr int kWindow = 1024;
constexpr int kAbove = kWindow, kNotFinite = kWindow + 1;  // indices of the two counts behind those of the window
constexpr int kWindowCounts = kWindow + 2;

// Return the lowest key of the window. The old threshold lies in its middle.
MFT_DEVICE uint32_t window_start(uint32_t hint, bool magnitude) {
  const uint32_t key = key_of<uint16_t>(hint, magnitude);
  return key > kWindow / 2 ? key - kWindow / 2 : 0;
}

// What changes from step to step.
struct StepClock {
  uint32_t step;
  float decay, minus_step_size, correction;
};

struct ScoreStepArguments {
  char *scores, *exp_avg, *exp_avg_sq;
  const char *grad, *weight;
  float* scales;            // of exp_avg's blocks, then of exp_avg_sq's
  const float* grad_scale;  // or null
  const uint16_t* hint;     // the old threshold; null: count nothing
  uint32_t* counts;         // kWindowCounts counts, zero at the beginning
  int64_t count;
  bool aligned;  // in each tensor, four neighbours begin at a multiple of their size
  bool grad_is_bfloat16, weight_is_bfloat16;  // if of 16 bits
  bool magnitude, sign;                       // sign: a factor of the gradient
  uint32_t seed_low, seed_high;
  float beta1, rest1, beta2, rest2, eps;  // rest: 1 - beta
  StepClock clock;
  const StepClock* clock_in_memory;  // used in place of clock; null: not used
};

// Grad, Weight: an unsigned word of an element's size; void: no weight. kCoded: moments in 8 bits.
template <ScoreFormat kFormat, bool kCoded, class Grad, class Weight>
struct ScoreStepKernel {
  static constexpr int kThreads = 256, kBlocksPerMultiprocessor = 3;
  using Arguments = ScoreStepArguments;

  static constexpr int kPairThreads = 64, kPairs = kThreads / kPairThreads;
  static constexpr int kSharedBytes = 4 * (kWindowCounts + 2 * kPairs * 4);

  MFT_DEVICE static void run(const Arguments& a) {
    uint32_t* const bins = reinterpret_cast<uint32_t*>(isa::shared_memory());
    const int thread = isa::thread(), pair = isa::warp() / 2;
    Counts counts = {};
    if (kCounts && a.hint != nullptr) {
      for (int i = thread; i < kWindowCounts; i += kThreads) bins[i] = 0;
      isa::sync_block();
      counts.bins = bins;
      counts.start = static_cast<int>(window_start(*a.hint, a.magnitude));
    }
    const int64_t chunks = (a.count + kStepChunk - 1) / kStepChunk, whole = a.aligned ? a.count / kStepChunk : 0;
    uint32_t* const largest = bins + kWindowCounts + 8 * pair;
    for (int64_t chunk = isa::block(0) * kPairs + pair; chunk < chunks; chunk += isa::blocks(0) * kPairs) {
      if (chunk < whole) {
        step_chunk<true>(a, chunk, pair, largest, counts);
      } else {
        step_chunk<false>(a, chunk, pair, largest, counts);
      }
    }
    if (!kCounts || a.hint == nullptr) return;
    if (counts.above != 0) isa::add_shared(&bins[kAbove], counts.above);
    if (counts.not_finite != 0) isa::add_shared(&bins[kNotFinite], counts.not_finite);
    isa::sync_block();
    for (int i = thread; i < kWindowCounts; i += kThreads) {
      if (bins[i] != 0) isa::add_global(&a.counts[i], bins[i]);
    }
  }

 private:
  using Codec = ScoreCodec<kFormat>;
  using Score = typename Codec::Word;
  using Moment = std::conditional_t<kCoded, uint8_t, uint32_t>;
  using Mean = Minifloat<15, 128>;
  using Square = Minifloat<31, 256>;
  static constexpr bool kHasWeight = !std::is_void_v<Weight>;
  static constexpr bool kCounts = sizeof(Score) == 2, kRandom = kCoded || Codec::kRounds;

  template <class Word>
  using Four = isa::Words<sizeof(Word)>;  // neighbours as they lie in memory

  struct Counts {
    uint32_t* bins;  // of the block; null: count nothing
    int start;
    uint32_t above, not_finite;  // of this thread: nine in ten scores are above, too many for one counter of the block
  };

  // Return a field of the clock. It is read where it is needed: if it stayed in registers, one kernel would spill.
  template <class Value>
  MFT_DEVICE static Value now(const Arguments& a, Value StepClock::*field) {
    return a.clock_in_memory == nullptr ? a.clock.*field : a.clock_in_memory->*field;
  }

  template <bool kWhole>
  MFT_DEVICE static void step_chunk(const Arguments& a, int64_t chunk, int pair, uint32_t* largest, Counts& counts) {
    const int own = isa::thread() % kPairThreads;
    uint32_t words[4][4];  // of each neighbour, for each block
    if constexpr (kRandom) {
      const int64_t counter = chunk * kStepBlock + 4 * own;  // a multiple of 4: the lower half carries nothing
      const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
#pragma unroll
      for (int e = 0; e < 4; ++e) philox(words[e], low + e, high, now(a, &StepClock::step), a.seed_low, a.seed_high);
    }
    // Not unrolled: an unrolled loop would load four blocks ahead, for which there are no registers.
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int64_t block = chunk * 4 + i, first = block * kStepBlock + 4 * own;
      if (!kWhole && block * kStepBlock >= a.count) return;
      const int64_t left = a.count - first;
      const int inside = kWhole || left >= 4 ? 4 : left > 0 ? static_cast<int>(left) : 0;
      uint32_t random[4] = {};
      if constexpr (kRandom) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          random[e] = words[e][0];
          words[e][0] = words[e][1], words[e][1] = words[e][2], words[e][2] = words[e][3];
        }
      }
      step_four<kWhole>(a, block, first, inside, random, pair, largest + i % 2 * 4, counts);
    }
  }

  // Step four neighbours, of which the first `inside` exist. largest: memory for each warp's largest moments.
  template <bool kWhole>
  MFT_DEVICE static void step_four(const Arguments& a, int64_t block, int64_t first, int inside,
                                   const uint32_t (&random)[4], int pair, uint32_t* largest, Counts& counts) {
    const auto old = load<kWhole, Score>(a.scores, first, inside);
    const auto grad = load<kWhole, Grad>(a.grad, first, inside);
    auto mean = load<kWhole, Moment>(a.exp_avg, first, inside);
    auto square = load<kWhole, Moment>(a.exp_avg_sq, first, inside);
    float w[4] = {};
    if constexpr (kHasWeight) {
      const auto weight = load<kWhole, Weight>(a.weight, first, inside);
#pragma unroll
      for (int e = 0; e < 4; ++e) w[e] = widen<Weight>(get<Weight>(weight, e), a.weight_is_bfloat16);
    }
    float scale[2] = {};
    const int64_t blocks = (a.count + kStepBlock - 1) / kStepBlock;
    if constexpr (kCoded) scale[0] = a.scales[block], scale[1] = a.scales[blocks + block];

    float m[4], v[4];
    Four<Score> scores = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t word = get<Score>(old, e);
      float score = Codec::widen(word), g = widen<Grad>(get<Grad>(grad, e), a.grad_is_bfloat16);
      if constexpr (kHasWeight) {
        if constexpr (!kCoded) g = isa::multiply(g, w[e]);
        if (a.sign) g = isa::multiply(g, Codec::sign(score, word));
      }
      if (a.grad_scale != nullptr) g = isa::multiply(g, *a.grad_scale);
      score = isa::multiply(score, now(a, &StepClock::decay));
      if constexpr (kCoded) {
        m[e] = Mean::decode(get<Moment>(mean, e), scale[0]);
        v[e] = Square::decode(get<Moment>(square, e), scale[1]);
        step_coded(a, score, m[e], v[e], g, w[e]);
      } else {
        m[e] = isa::as_float(get<Moment>(mean, e));
        v[e] = isa::as_float(get<Moment>(square, e));
        step_exact(a, score, m[e], v[e], g);
      }
      const uint32_t stepped = Codec::narrow(score, word, random[e]);
      put<Score>(scores, e, stepped);
      if constexpr (kCounts) {
        if (counts.bins != nullptr && (kWhole || e < inside)) count(stepped, a.magnitude, counts);
      }
    }
    store<kWhole, Score>(a.scores, first, inside, scores);

    mean = {}, square = {};
    if constexpr (kCoded) {
      uint32_t tops[2] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!kWhole && e >= inside) continue;
        const uint32_t of_mean = isa::as_bits(m[e]) & kFloatMagnitude, of_square = isa::as_bits(v[e]) & kFloatMagnitude;
        tops[0] = tops[0] > of_mean ? tops[0] : of_mean;
        tops[1] = tops[1] > of_square ? tops[1] : of_square;
      }
      largest_of_pair(tops, pair, largest);
      const Coding of_mean = Coding::of(tops[0]), of_square = Coding::of(tops[1]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        put<Moment>(mean, e, Mean::encode(m[e], of_mean, random[e] >> 16));
        put<Moment>(square, e, Square::encode(v[e], of_square, random[e] >> 24));
      }
      if (isa::thread() % kPairThreads == 0) {
        a.scales[block] = of_mean.scale;
        a.scales[blocks + block] = of_square.scale;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        put<Moment>(mean, e, isa::as_bits(m[e]));
        put<Moment>(square, e, isa::as_bits(v[e]));
      }
    }
    store<kWhole, Moment>(a.exp_avg, first, inside, mean);
    store<kWhole, Moment>(a.exp_avg_sq, first, inside, square);
  }

  // Round as torch's kernels do: lerp_ and addcmul_ use a fused multiply-add, addcdiv_ does not.
  MFT_DEVICE static void step_exact(const Arguments& a, float& s, float& m, float& v, float g) {
    const float way = isa::add(g, -m);
    m = a.rest1 < 0.5f ? isa::fused(a.rest1, way, m) : isa::fused(isa::add(a.rest1, -1.0f), way, g);
    v = isa::fused(isa::multiply(a.rest2, g), g, isa::multiply(v, a.beta2));
    const float denominator = isa::add(isa::divide(isa::root(v), now(a, &StepClock::correction)), a.eps);
    s = isa::add(s, isa::divide(isa::multiply(now(a, &StepClock::minus_step_size), m), denominator));
  }

  MFT_DEVICE static void step_coded(const Arguments& a, float& s, float& m, float& v, float h, float w) {
    m = isa::add(isa::multiply(m, a.beta1), isa::multiply(h, a.rest1));
    v = isa::add(isa::multiply(v, a.beta2), isa::multiply(isa::multiply(h, h), a.rest2));
    float moved = m, root = isa::root(v);
    if constexpr (kHasWeight) {
      moved = isa::multiply(m, w);
      root = isa::multiply(root, isa::magnitude(w));
    }
    const float denominator = isa::add(isa::multiply(root, now(a, &StepClock::correction)), a.eps);
    s = isa::add(s, isa::divide(isa::multiply(moved, now(a, &StepClock::minus_step_size)), denominator));
  }

  // Replace tops by the larger ones of both warps, in both warps.
  MFT_DEVICE static void largest_of_pair(uint32_t (&tops)[2], int pair, uint32_t* largest) {
    const int half = isa::warp() % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) tops[i] = isa::largest_of_warp(tops[i]);
    if (isa::lane() == 0) largest[2 * half] = tops[0], largest[2 * half + 1] = tops[1];
    isa::sync_threads(1 + pair, kPairThreads);
#pragma unroll
    for (int i = 0; i < 2; ++i) tops[i] = largest[i] > largest[2 + i] ? largest[i] : largest[2 + i];
  }

  MFT_DEVICE static void count(uint32_t word, bool magnitude, Counts& counts) {
    if constexpr (kCounts) {
      const int place = static_cast<int>(key_of<uint16_t>(word, magnitude)) - counts.start;
      if ((word & 0x7fff) >= Codec::kInfinity) {
        ++counts.not_finite;
      } else if (place >= kWindow) {
        ++counts.above;
      } else if (place >= 0) {
        isa::add_shared(&counts.bins[place], 1);
      }
    }
  }

  template <class Word>
  MFT_DEVICE static float widen(uint32_t word, bool is_bfloat16) {
    if constexpr (sizeof(Word) == 4) return isa::as_float(word);
    return is_bfloat16 ? isa::as_float(word << 16) : isa::widen(Float16{static_cast<uint16_t>(word)});
  }

  template <class Word>
  MFT_DEVICE static uint32_t get(const Four<Word>& four, int e) {
    constexpr int kInWord = 4 / sizeof(Word), kBits = 8 * sizeof(Word);  // elements of 32 bits; bits of one
    return four.words[e / kInWord] >> (e % kInWord * kBits) & (0xffffffffu >> (32 - kBits));
  }

  template <class Word>
  MFT_DEVICE static void put(Four<Word>& four, int e, uint32_t value) {
    constexpr int kInWord = 4 / sizeof(Word), kBits = 8 * sizeof(Word);
    four.words[e / kInWord] |= value << (e % kInWord * kBits);
  }

  template <bool kWhole, class Word>
  MFT_DEVICE static Four<Word> load(const char* tensor, int64_t first, int inside) {
    const Word* const data = reinterpret_cast<const Word*>(tensor) + first;
    if constexpr (kWhole) return isa::load_words<sizeof(Word)>(data);
    Four<Word> four = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < inside) put<Word>(four, e, data[e]);
    }
    return four;
  }

  template <bool kWhole, class Word>
  MFT_DEVICE static void store(char* tensor, int64_t first, int inside, const Four<Word>& four) {
    Word* const data = reinterpret_cast<Word*>(tensor) + first;
    if constexpr (kWhole) {
      isa::store_words(data, four);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e < inside) data[e] = static_cast<Word>(get<Word>(four, e));
      }
    }
  }
};

struct WindowArguments {
  const uint32_t* counts;
  const uint16_t* hint;
  uint16_t* threshold;
  uint32_t* missed;  // 1 if the threshold lies outside the window; then it is not written
  uint32_t kept;
  uint32_t infinity;  // its bits
  bool magnitude;
};

// Finds the threshold: the bits of the kept-th largest key, of +inf if nothing is kept, of NaN if a score is not
// finite. One block.
struct WindowKernel {
  static constexpr int kThreads = kWindow, kBlocksPerMultiprocessor = 1;
  static constexpr int kWarps = kThreads / 32, kSharedBytes = 4 * (kWarps + 1);
  using Arguments = WindowArguments;

  MFT_DEVICE static void run(const Arguments& a) {
    uint32_t* const totals = reinterpret_cast<uint32_t*>(isa::shared_memory());  // of each warp
    uint32_t* const found = totals + kWarps;
    const int thread = isa::thread(), lane = isa::lane(), warp = isa::warp();
    const uint32_t own = a.counts[kWindow - 1 - thread];  // the first thread has the highest key
    const uint32_t in_warp = scan(own, lane);
    if (lane == 31) totals[warp] = in_warp;
    if (thread == 0) *found = 0;
    isa::sync_block();
    const uint32_t warps = scan(totals[lane], lane);
    const uint32_t reached = a.counts[kAbove] + isa::shuffle(warps, warp) - totals[warp] + in_warp;
    const bool special = a.counts[kNotFinite] != 0 || a.kept == 0;
    if (!special && reached - own < a.kept && a.kept <= reached) {  // one thread at most
      const uint32_t key = window_start(*a.hint, a.magnitude) + (kWindow - 1 - thread);
      *a.threshold = static_cast<uint16_t>(bits_of_key<uint16_t>(key, a.magnitude));
      *found = 1;
    }
    isa::sync_block();
    if (thread != 0) return;
    const uint32_t quiet = a.infinity | a.infinity >> 1;  // NaN
    if (special) *a.threshold = static_cast<uint16_t>(a.counts[kNotFinite] != 0 ? quiet : a.infinity);
    *a.missed = special || *found != 0 ? 0 : 1;
  }
};

}  // namespace mft::cuda
