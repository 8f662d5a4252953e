// The forward and d_x on sm_90a: the masked weight as wgmma's first operand, from registers.
//
//   forward      out.T (N, M) = Wm   (N, K) @ in.T (K, M)      P = N features, Q = K summed over
//   transposed   out.T (K, M) = Wm.T (K, N) @ in.T (N, M)      P = K, Q = N
//
// A tile of out.T is 128 features x kTokens tokens; two blocks of a cluster take neighbouring features and the same
// tokens. Each block: one producer thread and two consumer warpgroups, 64 features each.
//
//                     Q, 64 per step                      tokens
//              +----------------------+            +---------------------+
//   block 0    | W, scores: own TMA   |            |  in: each block     |
//   128 feat.  |                      |            |  loads one half and |
//              +----------------------+   x   64   |  multicasts it to   |
//   block 1    | W, scores: own TMA   |       of Q |  both               |
//   128 feat.  |                      |            |                     |
//              +----------------------+            +---------------------+
//
// There are two rings of the same depth. One holds steps of W with their scores (or packed words) under one barrier,
// the other steps of `in`. A consumer reads W and scores as fragments, selects (keep.h), and multiplies from registers:
// neither mask nor masked weight is ever written. weight_sm90.h says how W and mask are loaded and read.
//
// Two sets of registers alternate: while the tensor cores work on one, the next step is masked into the other. A stage
// of W is free as soon as it is masked, a stage of `in` after its product. With one barrier for both, W would become
// free two steps later, and only one of three stages would be loading.
//
// The number of steps is even. The last step may lie outside the matrices, where TMA reads zeros. An odd step behind
// the loop would make ptxas wait for each wgmma (its warning C7514).
//
// The kernel is persistent; the producer fills the ring for the next tile while the consumers store this one.
//
// If there are fewer tiles than clusters, Q is cut into parts of whole pairs of steps. Each part of a tile is a job of
// its own, whose fp32 sums go to the workspace. sum_parts adds them in the order of the parts. product_sm90_launch.cuh
// chooses the number of parts and the tokens of a tile.
#pragma once

#include "weight_sm90.h"

namespace mft::cuda {

template <class Source, int kTokens>
struct ProductSm90 {
  using T = typename Source::Number;
  static constexpr int kConsumers = sm90::kConsumers, kFeatures = sm90::kFeatures, kStep = sm90::kStep;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of a thread. A block begins with 168 each.
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * 168);
  static constexpr int kBlocksPerMultiprocessor = 1;
  static constexpr int kCluster = 2;

  static constexpr int kInputBytes = kTokens * kStep * 2;
  static constexpr int kWeightStageBytes = Source::kStageBytes;
  static constexpr int kStageBytes = kWeightStageBytes + kInputBytes;

  // Results leave through buffers of 32 tokens x 64 features for each warpgroup.
  static constexpr int kStoreTokens = 32, kStoreBytes = kStoreTokens * kRowBytes;
  static constexpr int kStoreBuffers = 3;  // one is filled while the others are read

  static constexpr int kSharedLimit = 227 * 1024;  // of a block on sm_90
  static constexpr int kStoresBytes = kConsumers * kStoreBuffers * kStoreBytes;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kStages = (kSharedLimit - kStoresBytes - kBarrierBytes) / kStageBytes < 8
                                     ? (kSharedLimit - kStoresBytes - kBarrierBytes) / kStageBytes
                                     : 8;
  static constexpr int kSharedBytes = kStages * kStageBytes + kStoresBytes + kBarrierBytes;
  static_assert(kStages >= 3 && kWeightStageBytes % 1024 == 0);

  struct Arguments {
    sm90::WeightArguments weight;
    isa::TensorMap in, out;
    const T* bias;  // (P,) or null
    int features, tokens;
    int steps;  // of Q, even
    int feature_tiles, token_tiles;  // of clusters
    int part_count, part_steps;      // even
    float* parts;                    // (part_count, tokens, part_stride); null: one part, and `out` is written
    int64_t part_stride;
  };

  // A tile of the output, for one part.
  struct Job {
    int feature, token, part;  // the first ones
  };

  struct Place {  // in the ring
    int stage = 0;
    uint32_t parity = 0;

    MFT_DEVICE void advance() {
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  };

  MFT_DEVICE static char* weight_of(int stage) { return isa::shared_memory() + stage * kWeightStageBytes; }
  MFT_DEVICE static char* input_of(int stage) {
    return isa::shared_memory() + kStages * kWeightStageBytes + stage * kInputBytes;
  }
  MFT_DEVICE static char* stores_of(int consumer) { return input_of(kStages) + consumer * kStoreBuffers * kStoreBytes; }
  MFT_DEVICE static isa::TransactionBarrier* barrier(int kind, int stage) {
    return reinterpret_cast<isa::TransactionBarrier*>(stores_of(kConsumers)) + kind * kStages + stage;
  }
  MFT_DEVICE static isa::TransactionBarrier* weight_full(int stage) { return barrier(0, stage); }
  MFT_DEVICE static isa::TransactionBarrier* weight_empty(int stage) { return barrier(1, stage); }
  MFT_DEVICE static isa::TransactionBarrier* input_full(int stage) { return barrier(2, stage); }
  MFT_DEVICE static isa::TransactionBarrier* input_empty(int stage) { return barrier(3, stage); }

  MFT_DEVICE static void run(const Arguments& a) {
    const int rank = isa::rank_in_cluster();
    if (isa::thread() == 0) {
      Source::prefetch(a.weight);
      isa::prefetch(a.in);
      isa::prefetch(a.out);
      for (int stage = 0; stage < kStages; ++stage) {
        isa::init_barrier(weight_full(stage), 1);
        isa::init_barrier(weight_empty(stage), kConsumers * 4);  // warps
        isa::init_barrier(input_full(stage), 1);
        isa::init_barrier(input_empty(stage), kConsumers * kCluster);  // both blocks write into each other's ring
      }
      isa::publish_barriers();
    }
    isa::sync_warp();  // sync_cluster is for whole warps
    isa::sync_cluster();
    const int group = isa::warp() / 4;
    if (group == kConsumers) {
      isa::give_registers<kProducerRegisters>();
      if (isa::thread() == kConsumers * 128) produce(a, rank);
      isa::sync_warp();
    } else {
      isa::claim_registers<kConsumerRegisters>();
      consume(a, rank, group);
    }
    isa::sync_cluster();  // no block ends while the other may still write to it
  }

 private:
  // Call body for each of the cluster's tiles.
  template <class Body>
  MFT_DEVICE static void for_each_tile(const Arguments& a, int rank, Body body) {
    const int clusters = static_cast<int>(isa::blocks(0)) / kCluster;
    const int tiles = a.feature_tiles * a.token_tiles;
    for (int i = static_cast<int>(isa::block(0)) / kCluster; i < tiles * a.part_count; i += clusters) {
      const Tile tile = tile_at(i % tiles, a.feature_tiles, a.token_tiles);
      body(Job{(tile.feature * kCluster + rank) * kFeatures, tile.token * kTokens, i / tiles});
    }
  }

  // ------------------------------------------------------------------------------------------------ producer

  // Called by one thread.
  MFT_DEVICE static void produce(const Arguments& a, int rank) {
    Place place;
    for_each_tile(a, rank, [&](const Job& job) {
      const int first = job.part * a.part_steps, end = first + steps_of(a, job.part);
      for (int step = first; step < end; ++step, place.advance()) {
        isa::TransactionBarrier* b = weight_full(place.stage);
        isa::wait(weight_empty(place.stage), place.parity ^ 1);  // true at once on the first round
        isa::arrive_expecting(b, Source::kStageBytes);
        const int q = step * kStep;
        Source::bring(a.weight, b, weight_of(place.stage), job.feature, q);
        constexpr int kHalf = kTokens / kCluster;
        b = input_full(place.stage);
        isa::wait(input_empty(place.stage), place.parity ^ 1);
        isa::arrive_expecting(b, kInputBytes);
        isa::load_tile_multicast(a.in, b, (1 << kCluster) - 1, input_of(place.stage) + rank * kHalf * kRowBytes, q,
                                 job.token + rank * kHalf);
      }
    });
  }

  MFT_DEVICE static int steps_of(const Arguments& a, int part) {
    const int left = a.steps - part * a.part_steps;
    return left < a.part_steps ? left : a.part_steps;
  }

  // ----------------------------------------------------------------------------------------------- consumers

  // The masked weights of one step, in the layout of wgmma's first operand.
  struct Fragments {
    isa::Register of[kStep / 16][4];
  };

  using Lane = typename Source::Lane;

  MFT_DEVICE static void consume(const Arguments& a, int rank, int group) {
    Lane lane(group);
    Place place;
    int buffer = 0;
    for_each_tile(a, rank, [&](const Job& job) {
      const int feature = job.feature + 64 * group;  // of this warpgroup
      float sums[kTokens / 2];
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0;
      Source::begin_tile(lane, a.weight, a.features, feature);
      Fragments even, odd;
      int before = place.stage;  // the stage that the product in flight reads
      const int steps = steps_of(a, job.part);
      for (int step = 0; step < steps; step += 2) {
        load(even, lane, place, step);
        multiply(sums, even, place);
        isa::wait_products<1>();
        if (step > 0) release_input(before);
        before = place.stage;
        place.advance();
        load(odd, lane, place, step + 1);
        multiply(sums, odd, place);
        isa::wait_products<1>();
        release_input(before);
        before = place.stage;
        place.advance();
      }
      isa::wait_products<0>();
      isa::fence_registers(sums);
      release_input(before);
      if (a.parts != nullptr) {
        store_part(a, lane, sums, feature, job.token, job.part);
      } else {
        store(a, lane, sums, feature, job.token, buffer);
      }
    });
    isa::wait_stores_read<0>();
  }

  // One thread of the warpgroup tells each block that a stage is free. The product it waited for needed all four warps.
  MFT_DEVICE static void release_input(int stage) {
    const int thread = isa::thread() % 128;
    if (thread < kCluster) isa::arrive(input_empty(stage), thread);
  }

  MFT_DEVICE static void load(Fragments& fragments, const Lane& lane, const Place& place, int step) {
    isa::wait(weight_full(place.stage), place.parity);
    Source::read(fragments.of, weight_of(place.stage), lane, step);
    isa::sync_warp();
    if (isa::lane() == 0) isa::arrive_after(fragments.of, weight_empty(place.stage), isa::rank_in_cluster());
  }

  MFT_DEVICE static void multiply(float (&sums)[kTokens / 2], Fragments& fragments, const Place& place) {
    isa::wait(input_full(place.stage), place.parity);
    const uint64_t in = isa::descriptor(input_of(place.stage));
    isa::fence_registers(sums);
    isa::begin_products();
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      isa::product<T, kTokens>(sums, fragments.of[i], in + (i * 32 >> 4));  // 16 elements on, within the swizzled row
    }
    isa::commit_products();
  }

  // Eight lanes write a sector.
  MFT_DEVICE static void store_part(const Arguments& a, const Lane& lane, const float (&sums)[kTokens / 2], int feature,
                                    int token, int part) {
    float* const to = a.parts + (static_cast<int64_t>(part) * a.tokens + token) * a.part_stride + feature +
                      16 * lane.warp + lane.g;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int t = i / 4 * 8 + lane.c + i % 2;
      if (token + t < a.tokens) to[t * a.part_stride + i / 2 % 2 * 8] = sums[i];
    }
  }

  // Write out (tokens, features). Every 32 tokens of the sums are transposed into a buffer, which TMA stores.
  MFT_DEVICE static void store(const Arguments& a, const Lane& lane, const float (&sums)[kTokens / 2], int feature,
                               int token, int& buffer) {
    float bias[2] = {0, 0};
    if (a.bias != nullptr) {
      for (int i = 0; i < 2; ++i) {
        const int f = feature + 16 * lane.warp + lane.g + 8 * i;
        bias[i] = f < a.features ? isa::widen(a.bias[f]) : 0;
      }
    }
    const bool leader = isa::thread() % 128 == 0;
#pragma unroll
    for (int t = 0; t < kTokens; t += kStoreTokens) {
      char* shared = stores_of(lane.group) + buffer * kStoreBytes;
      if (leader) isa::wait_stores_read<kStoreBuffers - 1>();
      isa::sync_threads(1 + lane.group, 128);  // the buffer is free
#pragma unroll
      for (int u = 0; u < kStoreTokens; u += 16) {  // two blocks of 8 tokens, two of 8 features
        const float* d = &sums[(t + u) / 2];
        const uint32_t r[4] = {
            isa::round_pair<T>(d[0] + bias[0], d[1] + bias[0]), isa::round_pair<T>(d[2] + bias[1], d[3] + bias[1]),
            isa::round_pair<T>(d[4] + bias[0], d[5] + bias[0]), isa::round_pair<T>(d[6] + bias[1], d[7] + bias[1])};
        const int row = u + isa::lane() / 16 * 8 + isa::lane() % 8, chunk = 2 * lane.warp + isa::lane() / 8 % 2;
        isa::store_matrices_transposed(shared + swizzled(row, chunk), r);
      }
      isa::fence_shared_for_tma();
      isa::sync_threads(1 + lane.group, 128);  // the buffer is full
      if (leader) {
        isa::store_tile(a.out, shared, feature, token + t);
        isa::commit_stores();
      }
      buffer = buffer + 1 == kStoreBuffers ? 0 : buffer + 1;
    }
  }
};

}  // namespace mft::cuda
