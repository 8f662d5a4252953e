// A checksum of what each kernel of the CPU library computes from many inputs: one line per kernel and number format.
// Every build must print checksums.txt: gcc's and clang's, for AVX-512 and for any machine, on x86-64 and on aarch64.
//
// Linked with the library's own files, except the two that use torch (torch_on_host.cpp replaces them). The environment
// variable MFT_CPU_CAPABILITY chooses the instruction set. Products use small integers, so that the order of a sum does
// not matter.
#include <cmath>
#include <string>
#include <utility>

#include "capability.h"
#include "inputs.h"
#include "keep_range.h"
#include "linear.h"
#include "score_step.h"
#include "select.h"

namespace {

using namespace inputs;
using mft::KeepRange;
using mft::MaskRow;
using mft::ScoreFormat;
using mft::SignRow;

constexpr bool kModes[] = {true, false};
const char* mode_name(bool magnitude) { return magnitude ? "magnitude" : "value"; }

constexpr int64_t kColumns[] = {1, 7, 16, 31, 32, 33, 63, 64, 100, 511, 512, 513, 1057};
const double kThresholds[] = {-INFINITY, -1, -0.0, 0, 1e-45, 3e-6, 0.0078, 0.1, 0.5, 65504, 1e39, INFINITY, NAN};

const mft::RowKernels& rows() { return *mft::chosen_capability().rows; }

// ------------------------------------------------------------------------------------------------ ranges, masks, bits

void ranges() {
  for (const Format f : kFormats) {
    Checksum bounds, values;
    for (const bool magnitude : kModes) {
      for (const double threshold : kThresholds) {
        const KeepRange range = mft::range_at_least(threshold, f, magnitude);
        bounds.add(range.low), bounds.add(range.count), bounds.add(range.magnitude);
      }
      const int64_t step = f == Format::kFloat32 ? 777777 : 7;
      for (int64_t key = mft::least_key(f, magnitude); key <= mft::infinity_key(f); key += step) {
        const double value = mft::value_of_key(key, f, magnitude);
        uint64_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        values.add(bits);
      }
    }
    bounds.print(std::string("range_at_least ") + name_of(f));
    values.print(std::string("value_of_key ") + name_of(f));
  }
}

// Calls with_scores(scores, range, columns, checksum) for rows of many lengths and alignments, with each threshold.
template <typename Use>
void for_score_rows(const std::string& kernel, const Use& use) {
  for (const Format f : kFormats) {
    for (const bool magnitude : kModes) {
      Random random(1);
      Checksum sum;
      for (const int64_t columns : kColumns) {
        const Memory scores(columns, mft::bytes_of(f), columns % 3);
        fill(scores, [&] { return odd(random, f); });
        for (const double threshold : kThresholds) {
          use(random, scores.data(), f, mft::range_at_least(threshold, f, magnitude), columns, sum);
        }
      }
      sum.print(kernel + " " + name_of(f) + " " + mode_name(magnitude));
    }
  }
}

void masks() {
  for_score_rows("pack", [](Random&, const void* scores, Format f, KeepRange range, int64_t columns, Checksum& sum) {
    const Memory words((columns + 31) / 32, 4);
    rows().pack(words.as<uint32_t>(), scores, f, range, columns);
    sum.add_bits(words);
  });
  for_score_rows("count", [](Random&, const void* scores, Format f, KeepRange range, int64_t columns, Checksum& sum) {
    sum.add(static_cast<uint64_t>(rows().count(scores, f, range, columns)));
  });
  for_score_rows("mask", [](Random& random, const void* scores, Format f, KeepRange range, int64_t columns,
                            Checksum& sum) {
    const Memory words((columns + 31) / 32, 4);
    fill(words, [&] { return static_cast<uint32_t>(random.next()); });
    for (const int width : {2, 4}) {
      const Format weight_format = width == 4 ? Format::kFloat32 : Format::kBFloat16;
      const Memory weight(columns, width, columns % 5), out(columns, width, 1);
      fill(weight, [&] { return odd(random, weight_format); });
      rows().mask(out.data(), weight.data(), width, MaskRow{scores, nullptr, range}, f, columns);
      sum.add_bits(out);  // bits: a kept number is copied as it is, even NaN
      rows().mask(out.data(), weight.data(), width, MaskRow{nullptr, words.as<uint32_t>(), {0, 0, false}}, f, columns);
      sum.add_bits(out);
      rows().mask(weight.data(), weight.data(), width, MaskRow{scores, nullptr, range}, f, columns);
      sum.add_bits(weight);
    }
  });
}

// ------------------------------------------------------------------------------------------------ score gradients

void score_gradients() {
  for (const Format out_format : kFormats) {
    for (const Format f : kFormats) {
      Checksum sum;
      Random random(2);
      for (const int64_t columns : {int64_t{1}, int64_t{45}, int64_t{512}, int64_t{777}}) {
        const Memory grad(columns, mft::bytes_of(f), 1), words((columns + 31) / 32, 4);
        fill(grad, [&] { return odd(random, f, 20); });
        fill(words, [&] { return static_cast<uint32_t>(random.next()); });
        for (const Format other : kFormats) {  // of the weight, and of the scores
          const Memory weight(columns, mft::bytes_of(other), 2), scores(columns, mft::bytes_of(other), 3);
          fill(weight, [&] { return odd(random, other, 20); });
          fill(scores, [&] { return odd(random, other); });
          for (const void* factor : {static_cast<const void*>(nullptr), static_cast<const void*>(weight.data())}) {
            const SignRow signs[] = {{nullptr, nullptr}, {nullptr, words.as<uint32_t>()}, {scores.data(), nullptr}};
            for (const SignRow& sign : signs) {
              for (const bool accumulate : {false, true}) {
                const Memory out(columns, mft::bytes_of(out_format), columns % 4);
                fill(out, [&] { return odd(random, out_format, 20); });
                rows().score_grad(out.data(), out_format, grad.data(), f, factor, other, sign, other, accumulate,
                                  columns);
                sum.add_numbers(out, out_format);
              }
            }
          }
        }
      }
      sum.print(std::string("score_grad ") + name_of(out_format) + " from " + name_of(f));
    }
  }
}

void roundings() {
  for (const Format f : {Format::kBFloat16, Format::kFloat16}) {
    constexpr int64_t kCount = 20000;
    Random random(6);
    Checksum sum;
    const Memory in(kCount, 4), out(kCount, 2);
    fill(in, [&] { return near_tie(random, f); });
    rows().score_grad(out.data(), f, in.data(), Format::kFloat32, nullptr, f, {nullptr, nullptr}, f, false, kCount);
    sum.add_numbers(out, f);
    sum.print(std::string("rounding ") + name_of(f));
  }
}

// ------------------------------------------------------------------------------------------------ selection

void selections() {
  constexpr int64_t kSizes[] = {1, 33, 5000, 300000};  // the last is more than one thread takes at a time
  for (const Format f : kFormats) {
    for (const bool magnitude : kModes) {
      Random random(3);
      Checksum sum;
      for (const int64_t n : kSizes) {
        const Memory scores(n, mft::bytes_of(f), 1);
        for (const int kind : {0, 1, 2}) {  // all different, many ties, NaN and infinities among them
          if (kind > 0 && n > 5000) continue;
          fill(scores, [&] {
            return kind == 0 ? moderate(random, f) : kind == 1 ? integer(random, f, 3) : odd(random, f, 1000);
          });
          for (const int64_t k : {int64_t{0}, int64_t{1}, n - n / 10, n}) {
            sum.add(mft::kth_largest(scores.data(), f, n, k, magnitude));
          }
        }
      }
      sum.print(std::string("kth_largest ") + name_of(f) + " " + mode_name(magnitude));
    }
  }
}

// ------------------------------------------------------------------------------------------------ optimiser steps

struct StepCase {
  ScoreFormat scores;
  Format grad;
  const Format* weight;
  bool coded, magnitude, decays;
};

// Three steps; each takes the previous step's threshold as its hint.
void steps_of(const StepCase& s, int64_t n, Random& random, Checksum& sum) {
  const Format score_format = mft::selected_as(s.scores);
  const int64_t blocks = (n + mft::kStepBlock - 1) / mft::kStepBlock;
  const Format weight_format = s.weight != nullptr ? *s.weight : Format::kFloat32;
  const Memory scores(n, mft::bytes_of(score_format)), grad(n, mft::bytes_of(s.grad), 1);
  const Memory weight(n, mft::bytes_of(weight_format), 1);
  const Memory mean(n, s.coded ? 1 : 4), square(n, s.coded ? 1 : 4), scales(2 * blocks, 4);
  const auto score = [&]() -> uint32_t {  // the lower 15 bits of a fixed-point code count steps of 2^-18
    if (s.scores == ScoreFormat::kFixed16) return static_cast<uint32_t>(random.below(31744) | random.below(2) << 15);
    return random.below(50) == 0 ? 0 : moderate(random, score_format);
  };
  fill(scores, score);
  fill(weight, [&] { return moderate(random, weight_format, 6); });
  for (const Memory* zero : {&mean, &square, &scales}) fill(*zero, [] { return 0u; });

  mft::StepTensors t{scores.data(), s.scores,       grad.data(),         s.grad, nullptr, weight_format, mean.data(),
                     square.data(), nullptr,        nullptr};
  if (s.weight != nullptr) t.weight = weight.data();
  if (s.coded) t.mean_scales = scales.as<float>(), t.square_scales = t.mean_scales + blocks;
  mft::StepConstants c{};
  c.beta1 = 0.875f, c.one_minus_beta1 = 0.125f, c.beta2 = 0.96875f, c.one_minus_beta2 = 0.03125f;
  c.decay = 0.9990234375f, c.decays = s.decays;
  c.grad_scale = 0.75f, c.scales_grad = s.decays;
  c.eps = 1e-8f;
  c.sign = s.magnitude && s.weight != nullptr;
  c.seed_low = 12345, c.seed_high = 678;

  uint32_t found = 0;
  const Memory near(1, mft::bytes_of(score_format));
  for (uint32_t step = 1; step <= 3; ++step) {
    fill(grad, [&] { return random.below(100) == 0 ? 0 : moderate(random, s.grad, 10); });
    c.step = step;
    c.minus_step_size = -0.01f / static_cast<float>(step);
    c.correction = s.coded ? 4.0f / static_cast<float>(step) : 0.25f * static_cast<float>(step);
    near.set(0, found);
    const int64_t k = n % 2 == 0 && step == 2 ? -1 : n - n / 10;
    const mft::StepKernels& kernels = *mft::chosen_capability().step;
    found = mft::score_step(kernels, t, c, n, k, s.magnitude, found != 0 ? near.data() : nullptr);
    sum.add(found);
    sum.add_bits(scores);
    s.coded ? sum.add_bits(mean) : sum.add_numbers(mean, Format::kFloat32);
    s.coded ? sum.add_bits(square) : sum.add_numbers(square, Format::kFloat32);
    sum.add_bits(scales);
  }
}

void steps() {
  const char* const names[] = {"fp32", "bf16", "fixed16"};
  for (const bool coded : {false, true}) {
    for (const ScoreFormat f : {ScoreFormat::kFloat32, ScoreFormat::kBFloat16, ScoreFormat::kFixed16}) {
      for (const Format grad : kFormats) {
        Random random(4);
        Checksum sum;
        const Format* const none = nullptr;
        const std::pair<const Format*, int64_t> cases[] = {
            {none, 255}, {&kFormats[0], 1}, {&kFormats[1], 1030}, {&kFormats[2], 257}, {&kFormats[1], 9001}};
        for (const auto& [weight, n] : cases) {
          steps_of({f, grad, weight, coded, /*magnitude=*/n != 257, /*decays=*/n > 1000}, n, random, sum);
        }
        sum.print(std::string("score_step ") + names[static_cast<int>(f)] + (coded ? " 8-bit" : " fp32") +
                  " moments, gradient " + name_of(grad));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ products

struct Shape {
  int64_t tokens, rows, columns;
};

constexpr Shape kShapes[] = {{1, 1, 1}, {1, 40, 70}, {3, 33, 64}, {35, 13, 33}, {2, 3, 545}};

mft::Matrix matrix(const Memory& memory, Format f, int64_t rows, int64_t columns) {
  return {memory.data(), f, rows, columns, columns};
}

// The four ops on integers so sparse that sums stay exact in 8 bits. The weights that the mask drops are NaN.
void products_of(Format f, Format score_format, const Shape& s, Random& random, Checksum& sum) {
  const mft::Capability& cpu = mft::chosen_capability();
  const int width = mft::bytes_of(f);
  const auto sparse = [&] { return random.below(31) == 0 ? integer(random, f, 2) : 0; };
  const Memory x(s.tokens * s.columns, width), grad(s.tokens * s.rows, width), weight(s.rows * s.columns, width);
  const Memory scores(s.rows * s.columns, mft::bytes_of(score_format)), bias(s.rows, width);
  const int64_t word_columns = (s.columns + 31) / 32;
  const Memory words(s.rows * word_columns, 4), signs(s.rows * word_columns, 4);
  fill(x, sparse), fill(grad, sparse), fill(bias, [&] { return integer(random, f, 3); });
  fill(scores, [&] { return integer(random, score_format, 4); });
  fill(weight, [&] { return integer(random, f, 2); });
  const mft::Matrix x_matrix = matrix(x, f, s.tokens, s.columns), w = matrix(weight, f, s.rows, s.columns);
  const mft::Matrix grad_matrix = matrix(grad, f, s.tokens, s.rows);

  const KeepRange range = mft::range_at_least(2, score_format, true);
  const mft::MaskSource from_scores{scores.data(), score_format, nullptr, range, s.columns};
  const mft::MaskSource from_words{nullptr, Format::kFloat32, words.as<uint32_t>(), {0, 0, false}, s.columns};
  for (int64_t r = 0; r < s.rows; ++r) {
    const char* row = scores.as<char>() + r * s.columns * scores.width();
    rows().pack(words.as<uint32_t>() + r * word_columns, row, score_format, range, s.columns);
    rows().pack(signs.as<uint32_t>() + r * word_columns, row, score_format, mft::range_positive(score_format),
                s.columns);
  }
  const mft::SignSource by_scores{scores.data(), score_format, nullptr, s.columns};
  const mft::SignSource by_words{nullptr, Format::kFloat32, signs.as<uint32_t>(), s.columns};
  for (const mft::SignSource& sign : {by_scores, by_words, mft::SignSource{nullptr, f, nullptr, s.columns}}) {
    for (const Format out_format : {f, Format::kFloat32}) {
      const Memory out(s.rows * s.columns, mft::bytes_of(out_format));
      fill(out, [&] { return integer(random, out_format, 3); });
      for (const bool accumulate : {true, false}) {
        mft::grad_scores(cpu, matrix(out, out_format, s.rows, s.columns), grad_matrix, x_matrix, w, sign, accumulate);
        sum.add_numbers(out, out_format);
      }
    }
  }
  const Memory y(s.tokens * s.rows, width), d_x(s.tokens * s.columns, width), d_weight(s.rows * s.columns, width);
  for (int64_t i = 0; i < weight.elements(); ++i) {
    const uint32_t word = words.as<uint32_t>()[i / s.columns * word_columns + i % s.columns / 32];
    if (((word >> (i % s.columns % 32)) & 1) == 0) weight.set(i, layout_of(f).infinity + 1);
  }
  for (const mft::MaskSource& mask : {from_scores, from_words}) {
    mft::masked_linear(cpu, matrix(y, f, s.tokens, s.rows), x_matrix, w, mask, mask.words ? nullptr : bias.data());
    mft::grad_x(cpu, matrix(d_x, f, s.tokens, s.columns), grad_matrix, w, mask);
    mft::grad_weight(cpu, matrix(d_weight, f, s.rows, s.columns), grad_matrix, x_matrix, mask);
    sum.add_numbers(y, f), sum.add_numbers(d_x, f), sum.add_numbers(d_weight, f);
  }
}

void products() {
  for (const Format f : kFormats) {
    for (const Format score_format : kFormats) {
      Random random(5);
      Checksum sum;
      for (const Shape& s : kShapes) {
        products_of(f, score_format, s, random, sum);
      }
      sum.print(std::string("products ") + name_of(f) + ", scores " + name_of(score_format));
    }
  }
}

}  // namespace

int main() {
  std::fprintf(stderr, "%s\n", mft::chosen_capability().name);
  ranges();
  masks();
  score_gradients();
  roundings();
  selections();
  steps();
  products();
}
