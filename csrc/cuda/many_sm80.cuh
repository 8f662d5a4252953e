// out[i] = in[i] @ where(masks[tasks[i / each]], weight, 0).T + bias: one mask per token. Task -1 keeps every weight.
// An unknown task gives NaN. The weight is loaded as in decode_sm80, whose header describes it. Any number of rows, 64
// tokens per block.
//
// A block sorts its tokens by task, so that the tokens of one task are neighbours: a range. A warp has four units in
// registers at a time. For each range it makes a copy of them, masked by the words of that task, and multiplies the
// tiles of 8 tokens that the range touches. It keeps only the columns of the range. It selects these columns and never
// multiplies by zeros, because a weight that another mask keeps may be infinite. 64 tokens of 16 tasks touch 24 tiles,
// not 8 x 16.
//
// More than 64 tokens take further blocks, which read the weight again. Speed: not measured.
#pragma once

#include "decode_sm80.cuh"

namespace mft::cuda::sm80 {

struct ManyArguments : DecodeArguments {
  const uint32_t* masks[kMostMasks];
  int count;
  const char* tasks;
  bool long_tasks;  // of 8 bytes, else of 4
  int each;         // tokens per entry of tasks
};

// A block's tokens in the order of their tasks. Tasks: 0 to count - 1; count: every weight is kept; count + 1: unknown.
struct alignas(16) TaskTable {
  struct Range {
    int task, begin, end;
  };
  int task[64];   // of each token
  int token[64];  // of each place
  Range ranges[kMostMasks + 1];
  int range_count;

  template <class Arguments>
  MFT_DEVICE void make(const Arguments& a, int first_token, int tokens) {
    const int t = isa::thread();
    if (t < tokens) {
      const int64_t entry = (first_token + t) / a.each;  // of ints: a division of int64_t would be a function call
      const int64_t given = a.long_tasks ? load<int64_t>(a.tasks + 8 * entry) : load<int32_t>(a.tasks + 4 * entry);
      task[t] = given == -1 ? a.count : given >= 0 && given < a.count ? static_cast<int>(given) : a.count + 1;
    }
    isa::sync_block();
    if (t < tokens) {
      int place = 0;
      for (int i = 0; i < tokens; ++i) place += task[i] < task[t] || (task[i] == task[t] && i < t);
      token[place] = t;
    }
    if (t <= a.count) {  // one thread per task: its range, and the number of ranges before it
      Range range{t, 0, 0};
      uint32_t before = 0;  // one bit per task
      for (int i = 0; i < tokens; ++i) {
        range.begin += task[i] < t;
        range.end += task[i] <= t;
        if (task[i] < t) before |= 1u << task[i];
      }
      int number = 0;
      for (int i = 0; i < t; ++i) number += before >> i & 1;
      if (range.begin < range.end) ranges[number++] = range;
      if (t == a.count) range_count = number;
    }
    isa::sync_block();
  }
};

// T: of in, weight and out. kTiles: tiles of 8 tokens. kChunked: in and weight are chunked.
template <class T, int kTiles, bool kChunked>
struct ManyKernel {
  static constexpr int kThreads = sm80::kThreads, kTokens = 8 * kTiles, kBlocksPerMultiprocessor = 2;
  static constexpr int kAhead = decode_ahead(true);
  using Arguments = ManyArguments;

  MFT_DEVICE static void run(const Arguments& a) {
    const DecodePlace place = DecodePlace::of(a);
    UnitReader<kChunked> reader(a.weight, place);
    DecodeMask<Words, true, kAhead> mask(a, place);
    isa::Words4 weights[kAhead][2];
    int left = place.end - place.column;
    const auto load = [&](int j) {
      reader.load(weights[j], left, a);
      left -= a.step_columns;
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) load(j);

    TaskTable& table = *reinterpret_cast<TaskTable*>(isa::shared_memory());
    table.make(a, first_token(), tokens(a));
    const int ranges = table.range_count;
    const auto ask = [&](int range, int unit) {
      const int task = table.ranges[range].task;
      mask.ask(task < a.count ? a.masks[task] : nullptr, unit, place, a);
    };
    if (ranges > 0) ask(0, 0);

    float sums[kTiles][4] = {};
    for (int slab = 0, unit = 0; slab < a.part_units; slab += a.slab_units) {
      if (slab > 0) isa::sync_block();  // all warps are done with the slab before
      copy_in(a, table, slab);
      isa::wait_copies<0>();
      isa::sync_block();
      const int end = unit + a.slab_steps < place.count ? unit + a.slab_steps : place.count;
      const char* x = memory() + isa::lane() / 4 * a.in_stride + 64 * DecodeWarp::of(a).slice + 16 * (isa::lane() % 4);
      for (; unit < end; unit += kAhead, x += kAhead * a.step_bytes) {
        for (int i = 0; i < ranges; ++i) {
          const bool last = i + 1 == ranges;
          ask(last ? 0 : i + 1, last ? unit + kAhead : unit);
          const TaskTable::Range range = table.ranges[i];
#pragma unroll
          for (int j = 0; j < kAhead; ++j) {
            if (unit + j >= end) break;
            uint32_t kept[2][4];
            mask.select(kept, weights[j], j);
            if (last) load(j);
            multiply(sums, kept, x + j * a.step_bytes, a.in_stride, range);
          }
        }
      }
    }
    isa::sync_block();
    write(a, table, sums);
  }

  static int shared_bytes(int tokens, int slab_units, int slice_bits) {
    const int rows = (tokens + 7) / 8 * 8;  // rows behind the last token may hold anything: they are other columns
    return static_cast<int>(sizeof(TaskTable)) +
           std::max(rows * decode_row_stride(slab_units), 4 * tokens * sum_stride(slice_bits) << slice_bits);
  }

 private:
  static constexpr MFT_DEVICE int sum_stride(int slice_bits) { return (1 << (kDecodeRowBits - slice_bits)) + 4; }

  MFT_DEVICE static char* memory() { return isa::shared_memory() + sizeof(TaskTable); }  // behind the table
  MFT_DEVICE static int first_token() { return static_cast<int>(isa::block(2)) * kTokens; }
  MFT_DEVICE static int tokens(const Arguments& a) {
    const int left = a.out.rows - first_token();
    return left < kTokens ? left : kTokens;
  }

  MFT_DEVICE static void copy_in(const Arguments& a, const TaskTable& table, int slab) {
    const int left = a.part_units - slab, units = left < a.slab_units ? left : a.slab_units;
    const int first = kDecodePiece * (static_cast<int>(isa::block(1)) * a.part_units + slab);
    for (int at = isa::warp(); at < tokens(a); at += kThreads / 32) {
      const int token = first_token() + table.token[at];
#pragma unroll 1
      for (int chunk = isa::lane(); chunk < 4 * units; chunk += 32) {
        const int column = first + 8 * chunk;
        char* const to = memory() + at * a.in_stride + kChunkBytes * chunk;
        if constexpr (kChunked) {
          isa::copy_async<kChunkBytes>(to, at_16(a.in, token, column), column < a.in.columns);
        } else {
          store(to, eight_of<false>(at_16(a.in, token, column), a.in.columns - column));
        }
      }
    }
    isa::commit_copies();
  }

  MFT_DEVICE static void multiply(float (&sums)[kTiles][4], const uint32_t (&kept)[2][4], const char* x, int stride,
                                  const TaskTable::Range& range) {
    const int c = isa::lane() % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (range.begin >= 8 * tile + 8 || range.end <= 8 * tile) continue;
      const auto in = sm80::load<isa::Words4>(x + 8 * tile * stride);
      float product[4] = {sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]};
      for (int half = 0; half < 4; half += 2) {
        const uint32_t weights[4] = {kept[0][half], kept[1][half], kept[0][half + 1], kept[1][half + 1]};
        isa::multiply_16x8x16<T>(product, weights, in.words[half], in.words[half + 1]);
      }
      for (int i = 0; i < 4; ++i) {
        const int place = 8 * tile + c + i % 2;
        sums[tile][i] = place >= range.begin && place < range.end ? product[i] : sums[tile][i];
      }
    }
  }

  // As in decode_sm80, but tokens go back to their own rows.
  MFT_DEVICE static void write(const Arguments& a, const TaskTable& table, const float (&sums)[kTiles][4]) {
    const auto [group, slice] = DecodeWarp::of(a);
    const int features = 1 << (kDecodeRowBits - a.slice_bits), first_feature = static_cast<int>(isa::block(0)) * features;
    float* const to = reinterpret_cast<float*>(memory());
    const int count = tokens(a), stride = sum_stride(a.slice_bits), g = isa::lane() / 4, c = isa::lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int at = i / 4 * 8 + c + i % 2;
      if (at < count) to[(slice * count + at) * stride + 16 * group + i % 4 / 2 * 8 + g] = sums[i / 4][i % 4];
    }
    isa::sync_block();
#pragma unroll 1
    for (int i = isa::thread(); i < count * features; i += kThreads) {
      const int at = i >> (kDecodeRowBits - a.slice_bits), place = i & (features - 1), feature = first_feature + place;
      const int in_block = table.token[at], token = first_token() + in_block;
      float sum = 0;
      for (int j = 0; j < 1 << a.slice_bits; ++j) sum += to[(j * count + at) * stride + place];
      if (table.task[in_block] > a.count) sum = isa::as_float(0x7fc00000);
      if (a.parts != nullptr) {
        a.parts[(isa::block(1) * a.out.rows + token) * a.part_stride + feature] = sum;
      } else if (feature < a.out.columns) {
        if (a.bias != nullptr) sum += isa::widen(sm80::load<T>(a.bias + 2 * static_cast<int64_t>(feature)));
        store(at_16(a.out, token, feature), isa::round_to<T>(sum).bits);
      }
    }
  }
};

}  // namespace mft::cuda::sm80
