// The k-th largest key, exactly, from histograms of its digits; the host waits for nothing.
//
// A score's bits become an integer key with the same order as the scores: without the sign bit (by magnitude), or with
// negative scores reversed (by value). The key is found digit by digit, the highest first. A pass looks at the keys
// that begin with the digits found so far, and counts how often each value of the next digit occurs:
//
//   16 bits, by magnitude, 128 KiB of shared memory   |  eeeeeeeemmmmmmm               1 pass, 32,768 counts
//   16 bits, by magnitude                             |  eeeeeeeemmm mmmm              2 passes, 2,048 and 16 counts
//   16 bits, by value                                 |  seeeeeeeemm mmmmm             2 passes, 2,048 and 32
//   32 bits, by magnitude                             |  eeeeeeeemmm m.. m..           3 passes, 2,048, 1,024, 1,024
//   32 bits, by value                                 |  seeeeeeeemm m... m..          3 passes, 2,048, 2,048, 1,024
//
// A block counts in shared memory and adds its counts to those of the grid. The last block to do so finds the digit:
// each of its threads sums a stretch of counts, a scan over the threads finds the stretch that holds the key's rank,
// and that stretch's thread finds the count. Counts are integers, so the order of additions changes nothing.
//
// One pass over 58.7M scores of bf16 on an H100 [estimated, not measured]: memory takes 117 MB / 3.35 TB/s = 35 us. A
// multiprocessor counts 445,000 keys, 32 by one ATOMS.POPC.INC (and two shifts and two ANDs per pair: read in the
// SASS). Random bins put about 3.5 of 32 lanes on one bank, so counting takes 49,000 clocks = 28 us, at the same time
// as memory. 1,024 threads have 64 bytes each in flight, four times what the bandwidth needs at 700 ns. The last block
// adds about 5 us.
#pragma once

#include "keys.h"

namespace mft::cuda {

// The result of one pass, which the next one reads.
struct Found {
  uint32_t key;   // the digits so far
  uint32_t rank;  // of the wanted key among those that begin with them; 1 is the smallest
  uint32_t not_finite;
};

struct SelectArguments {
  const char* scores;
  int64_t count;
  uint32_t rank;          // of the threshold among all keys; 0 if there are none
  uint32_t infinity;      // its bits
  bool none;              // keep no score
  Found* found;
  uint32_t* blocks_done;  // of this pass; zero at the beginning
  uint32_t* counts;       // the 2^kBits counts of this pass; zero at the beginning
  void* threshold;
};

// Counts the digit of kBits above the lowest kShift bits. Word: unsigned, of a score's size.
template <class Word, bool kMagnitude, int kShift, int kBits>
struct SelectKernel {
  static constexpr int kThreads = 1024, kBlocksPerMultiprocessor = 1;
  using Arguments = SelectArguments;

  static constexpr int kBins = 1 << kBits;
  static constexpr int kTail = 64;  // words behind the bins, for the scan
  static constexpr int kSharedBytes = 4 * (kBins + kTail);
  static constexpr int kLoads = 4;  // of 16 bytes in flight in each thread

  static constexpr uint32_t kSign = 1u << (8 * sizeof(Word) - 1);
  static constexpr bool kFirst = kShift + kBits == 8 * sizeof(Word) - kMagnitude, kLast = kShift == 0;
  // The first digit holds the exponent, so that its counts tell whether a score is not finite.
  static_assert(!kFirst || kBits >= 9 - kMagnitude);

  MFT_DEVICE static void run(const Arguments& a) {
    uint32_t* const bins = reinterpret_cast<uint32_t*>(isa::shared_memory());
    for (int i = isa::thread(); i < kBins; i += kThreads) bins[i] = 0;
    isa::sync_block();
    count_all(a, bins, kFirst ? 0 : a.found->key);
    isa::sync_block();
    for (int i = isa::thread(); i < kBins; i += kThreads) {
      if (bins[i] != 0) isa::add_global(&a.counts[i], bins[i]);
    }
    if (is_last_block(a, bins + kBins)) find_digit(a, bins, bins + kBins);
  }

 private:
  // Return whether keys with this first digit are infinities or NaN.
  MFT_DEVICE static bool not_finite(uint32_t digit, uint32_t infinity) {
    if constexpr (kMagnitude) return digit >= infinity >> kShift;
    return digit >= (kSign | infinity) >> kShift || digit <= (kSign - 1 - infinity) >> kShift;
  }

  MFT_DEVICE static void count(uint32_t bits, uint32_t* bins, uint32_t found) {
    const uint32_t key = key_of<Word>(bits, kMagnitude), prefix = key >> kShift;
    if constexpr (kFirst) {
      isa::add_shared(&bins[prefix], 1);
    } else {
      if (prefix >> kBits == found) isa::add_shared(&bins[prefix % kBins], 1);
    }
  }

  MFT_DEVICE static void count(const isa::Words4& loaded, uint32_t* bins, uint32_t found) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = loaded.words[i];
      if constexpr (sizeof(Word) == 4) {
        count(word, bins, found);
      } else {
        count(word & 0xffff, bins, found);
        count(word >> 16, bins, found);
      }
    }
  }

  // The blocks share the scores between the first and the last multiple of 16 bytes. The first block also takes the
  // others.
  MFT_DEVICE static void count_all(const Arguments& a, uint32_t* bins, uint32_t found) {
    constexpr int kWords = 16 / sizeof(Word);
    const int64_t begin = -reinterpret_cast<intptr_t>(a.scores) & 15;
    const int64_t before = begin / static_cast<int>(sizeof(Word)) < a.count ? begin / sizeof(Word) : a.count;
    const int64_t vectors = (a.count - before) / kWords;
    const char* const aligned = a.scores + before * sizeof(Word);
    constexpr int64_t kTile = kThreads * kLoads;
    for (int64_t tile = isa::block(0) * kTile; tile < vectors; tile += isa::blocks(0) * kTile) {
      isa::Words4 loaded[kLoads];
      const int64_t first = tile + isa::thread();
      if (tile + kTile <= vectors) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) loaded[i] = isa::load_streaming(aligned + 16 * (first + i * kThreads));
#pragma unroll
        for (int i = 0; i < kLoads; ++i) count(loaded[i], bins, found);
      } else {
        for (int64_t i = first; i < vectors; i += kThreads) {
          count(isa::load_streaming(aligned + 16 * i), bins, found);
        }
      }
    }
    if (isa::block(0) == 0) {
      const Word* const scores = reinterpret_cast<const Word*>(a.scores);
      const int64_t after = before + vectors * kWords;  // less than a vector is left on either side
      if (isa::thread() < before) count(scores[isa::thread()], bins, found);
      if (after + isa::thread() < a.count) count(scores[after + isa::thread()], bins, found);
    }
  }

  // Return, in all threads, whether all other blocks have added their counts.
  MFT_DEVICE static bool is_last_block(const Arguments& a, uint32_t* tail) {
    isa::fence_device();
    isa::sync_block();
    if (isa::thread() == 0) tail[0] = isa::add_global(a.blocks_done, 1) + 1 == isa::blocks(0);
    isa::sync_block();
    isa::fence_device();
    return tail[0] != 0;
  }

  MFT_DEVICE static void find_digit(const Arguments& a, uint32_t* bins, uint32_t* tail) {
    constexpr int kStretch = kBins > kThreads ? kBins / kThreads : 1;  // counts of a thread
    constexpr int kWarps = kThreads / 32;
    const int thread = isa::thread(), lane = isa::lane(), warp = isa::warp();
#pragma unroll 8
    for (int i = thread; i < kBins; i += kThreads) bins[i] = isa::load_volatile(&a.counts[i]);
    uint32_t* const totals = tail;  // of each warp
    uint32_t* const bad = tail + kWarps;
    if (thread == 0) *bad = kFirst ? 0 : a.found->not_finite;
    const uint32_t rank = kFirst ? a.rank : a.found->rank;  // before a thread overwrites it
    isa::sync_block();

    // Lanes begin at different places of their stretches, so that they read from different banks.
    const int stretch = thread * kStretch;
    uint32_t own = 0;
    bool own_bad = false;
    if (stretch < kBins) {
      for (int i = 0; i < kStretch; ++i) {
        const int bin = stretch + (i + lane) % kStretch;
        own += bins[bin];
        if constexpr (kFirst) own_bad = own_bad || (bins[bin] != 0 && not_finite(bin, a.infinity));
      }
    }
    if (own_bad) isa::add_shared(bad, 1);
    const uint32_t in_warp = scan(own, lane);  // of this lane and those before it
    if (lane == 31) totals[warp] = in_warp;
    isa::sync_block();
    const uint32_t warps = scan(totals[lane], lane);
    const uint32_t up_to_warp = isa::shuffle(warps, warp) - isa::shuffle(in_warp, 31);
    const uint32_t up_to = up_to_warp + in_warp;

    uint32_t below = up_to - own;
    if (rank == 0 ? thread == 0 : below < rank && rank <= up_to) {  // one thread; the first if there are no scores
      int bin = stretch;
      for (; below + bins[bin] < rank; ++bin) below += bins[bin];
      const uint32_t key = (kFirst ? 0 : a.found->key << kBits) | bin;
      *a.found = {key, rank - below, *bad};
      if constexpr (kLast) {
        const uint32_t quiet = a.infinity | a.infinity >> 1;  // NaN
        const uint32_t bits = a.none ? a.infinity : bits_of_key<Word>(key, kMagnitude);
        *static_cast<Word*>(a.threshold) = static_cast<Word>(*bad != 0 ? quiet : bits);
      }
    }
  }
};

}  // namespace mft::cuda
