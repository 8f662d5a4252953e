// The kernels of an optimiser step. One source file per instruction set defines MFT_STEP_KERNELS and includes this
// file. The loops over 256 elements are plain, so that compilers vectorise them; their data stay in L1.
//
// Only raw pointers here: an inline function shared with other files could be linked from the wrong instruction set.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "step_kernels.h"

namespace mft {
namespace {

#include "formats.inl"

constexpr uint32_t kInfinity = 0x7f800000, kMagnitude = 0x7fffffff, kTop = 0x80000000;

inline const char* at(const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; }

// ------------------------------------------------------------------------------------------------ random words

// Counters of Philox, one per lane of 64 bits. Only the lower half of a lane counts: multiply() does not read the upper.
#if defined(__AVX512F__)
using Lanes = uint64_t __attribute__((vector_size(64)));
inline Lanes multiply(Lanes a, Lanes b) { return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
using Lanes = uint64_t __attribute__((vector_size(32)));
inline Lanes multiply(Lanes a, Lanes b) { return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
using Lanes = uint64_t __attribute__((vector_size(16)));
inline Lanes multiply(Lanes a, Lanes b) { return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
using Lanes = uint64_t __attribute__((vector_size(8)));
inline Lanes multiply(Lanes a, Lanes b) { return (a & 0xffffffff) * b; }
#endif
constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);
using Words = uint32_t __attribute__((vector_size(sizeof(Lanes) / 2)));

inline void store_words(uint32_t* words, Lanes c) {
  const Words low = __builtin_convertvector(c, Words);
  std::memcpy(words, &low, sizeof low);
}

// Writes one word per element of the chunk that begins at element `begin`: Philox 4x32-10.
void random_words(uint32_t* words, const StepConstants& c, int64_t begin) {
  const int64_t counter = begin / kStepChunk * kStepBlock;  // a multiple of 256: adding a lane has no carry
  const Lanes zero = {};
  Lanes next, keys[10][2];
  for (int i = 0; i < kLanes; ++i) next[i] = static_cast<uint64_t>(counter + i);
  for (uint32_t round = 0; round < 10; ++round) {
    keys[round][0] = zero + (c.seed_low + round * 0x9E3779B9);
    keys[round][1] = zero + (c.seed_high + round * 0xBB67AE85);
  }
  for (int lane = 0; lane < kStepBlock; lane += kLanes, next += kLanes) {
    Lanes c0 = next, c1 = zero + static_cast<uint64_t>(counter >> 32), c2 = zero + c.step, c3 = zero;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Lanes p0 = multiply(c0, zero + 0xD2511F53), p1 = multiply(c2, zero + 0xCD9E8D57);
      c0 = (p1 >> 32) ^ c1 ^ keys[round][0];
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ keys[round][1];
      c3 = p0;
    }
    store_words(words + lane, c0);
    store_words(words + lane + kStepBlock, c1);
    store_words(words + lane + 2 * kStepBlock, c2);
    store_words(words + lane + 3 * kStepBlock, c3);
  }
}

// ------------------------------------------------------------------------------------------------ scores

void load_scores(float* out, const StepTensors& t, int64_t begin, int64_t n) {
  if (t.score_format == ScoreFormat::kFloat32) {
    std::memcpy(out, static_cast<const float*>(t.scores) + begin, n * sizeof(float));
  } else if (t.score_format == ScoreFormat::kBFloat16) {
    const auto* s = static_cast<const uint16_t*>(t.scores) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = from_bfloat16(s[i]);
  } else {
    const auto* s = static_cast<const uint16_t*>(t.scores) + begin;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t magnitude = s[i] & 0x7fff;
      const uint32_t value = as_bits(static_cast<float>(magnitude) * 0x1p-18f);
      const uint32_t sign = static_cast<uint32_t>(s[i] & 0x8000) << 16;
      out[i] = as_float((magnitude > 31743 ? 0x7fc00000u : value) | sign);
    }
  }
}

void store_scores(const StepTensors& t, const float* in, const uint32_t* words, int64_t begin, int64_t n) {
  if (t.score_format == ScoreFormat::kFloat32) {
    std::memcpy(static_cast<float*>(t.scores) + begin, in, n * sizeof(float));
  } else if (t.score_format == ScoreFormat::kBFloat16) {
    auto* s = static_cast<uint16_t*>(t.scores) + begin;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = as_bits(in[i]);
      const uint32_t rounded = bits + (words[i] & 0xffff);  // infinity's lower half is 0: there is no carry
      s[i] = static_cast<uint16_t>(((bits & kMagnitude) > kInfinity ? 0x7fc00000 : rounded) >> 16);
    }
  } else {
    auto* s = static_cast<uint16_t*>(t.scores) + begin;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = as_bits(in[i]), magnitude = bits & kMagnitude;
      const float scaled = as_float(magnitude) * 0x1p18f, q = scaled < 31743.0f ? scaled : 31743.0f;
      const auto whole = static_cast<int32_t>(q);
      const auto bound = static_cast<float>(static_cast<int32_t>(words[i] & 0xffff));
      const int32_t code = whole + ((q - static_cast<float>(whole)) * 65536.0f > bound ? 1 : 0);
      const uint32_t sign = magnitude == 0 ? s[i] & 0x8000u : magnitude > kInfinity ? 0u : (bits & kTop) >> 16;
      s[i] = static_cast<uint16_t>((magnitude < kInfinity ? static_cast<uint32_t>(code) : 0x7c00u) | sign);
    }
  }
}

// Computes out[i] *= sign(score[i]). The sign of 0 and NaN is 0, but a fixed-point 0 has a sign bit, which counts as +1
// or -1.
void multiply_by_sign(float* out, const float* scores, ScoreFormat format, int64_t n) {
  if (format == ScoreFormat::kFixed16) {
    for (int64_t i = 0; i < n; ++i) out[i] = as_float(as_bits(out[i]) ^ (as_bits(scores[i]) & kTop));
  } else {
    for (int64_t i = 0; i < n; ++i) {  // by bits: a comparison may treat a subnormal as 0
      const uint32_t bits = as_bits(scores[i]), magnitude = bits & kMagnitude;
      out[i] *= as_float(magnitude - 1 < kInfinity ? (bits & kTop) | 0x3f800000 : 0);
    }
  }
}

// ------------------------------------------------------------------------------------------------ fp32 moments

void load_gradient(float* out, float* factor, const StepTensors& t, const float* scores, const StepConstants& c,
                   bool with_weight, int64_t begin, int64_t n) {
  widen(out, at(t.grad, begin * bytes_of(t.grad_format)), t.grad_format, n);
  if (with_weight && t.weight != nullptr) {
    widen(factor, at(t.weight, begin * bytes_of(t.weight_format)), t.weight_format, n);
    for (int64_t i = 0; i < n; ++i) out[i] *= factor[i];
  }
  if (c.sign) multiply_by_sign(out, scores, t.score_format, n);
  if (c.scales_grad) {
    for (int64_t i = 0; i < n; ++i) out[i] *= c.grad_scale;
  }
}

// Rounds as torch's lerp_ and addcmul_ do, with a fused multiply-add.
void move_moments(float* m, float* v, const float* g, const StepConstants& c, int64_t n) {
  const float rest1 = c.one_minus_beta1, beta2 = c.beta2, rest2 = c.one_minus_beta2;  // copies: m cannot alias them
  if (rest1 < 0.5f) {
    for (int64_t i = 0; i < n; ++i) m[i] = __builtin_fmaf(rest1, g[i] - m[i], m[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) m[i] = __builtin_fmaf(rest1 - 1.0f, g[i] - m[i], g[i]);
  }
  for (int64_t i = 0; i < n; ++i) v[i] = __builtin_fmaf(rest2 * g[i], g[i], v[i] * beta2);
}

void moments_of(const StepTensors& t, const StepConstants& c, int64_t begin, int64_t n) {
  alignas(64) float g[kStepBlock], s[kStepBlock], factor[kStepBlock];
  for (int64_t end = begin + n; begin < end; begin += kStepBlock) {
    const int64_t here = end - begin < kStepBlock ? end - begin : kStepBlock;
    if (c.sign) load_scores(s, t, begin, here);
    load_gradient(g, factor, t, s, c, true, begin, here);
    move_moments(static_cast<float*>(t.exp_avg) + begin, static_cast<float*>(t.exp_avg_sq) + begin, g, c, here);
  }
}

void scores_of(const StepTensors& t, const StepConstants& c, const float* root, int64_t begin, int64_t n) {
  alignas(64) float s[kStepBlock];
  alignas(64) uint32_t words[kStepChunk];
  for (int64_t done = 0; done < n; done += kStepBlock) {
    const int64_t first = begin + done, here = n - done < kStepBlock ? n - done : kStepBlock;
    if (t.score_format != ScoreFormat::kFloat32 && first % kStepChunk == 0) random_words(words, c, first);
    load_scores(s, t, first, here);
    const float* m = static_cast<const float*>(t.exp_avg) + first;
    if (c.decays) {
      for (int64_t i = 0; i < here; ++i) s[i] *= c.decay;
    }
    for (int64_t i = 0; i < here; ++i) {
      s[i] += c.minus_step_size * m[i] / (root[done + i] / c.correction + c.eps);
    }
    store_scores(t, s, words + first % kStepChunk, first, here);
  }
}

// ------------------------------------------------------------------------------------------------ 8-bit moments

// Decodes a minifloat with 3 mantissa bits. kCodes 128: the sign is in bit 7. kCodes 256: no sign.
template <int kBias, int kCodes>
inline float decode(uint8_t byte) {
  const float least = as_float(static_cast<uint32_t>(127 - 2 - kBias) << 23);  // 2^(-2 - bias)
  const uint32_t code = byte & (kCodes - 1);
  const uint32_t normal = (code + ((127 - kBias) << 3)) << 20;
  const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(code)) * least);
  const uint32_t sign = static_cast<uint32_t>(byte & ~(kCodes - 1) & 0xff) << 24;
  return as_float((code < 8 ? subnormal : normal) | sign);
}

// Encodes a block with stochastic rounding and returns its scale. top: the bits of the largest magnitude. The 8 bits of
// each word from bit kShift on decide the rounding.
template <int kBias, int kCodes, int kShift>
float encode(uint8_t* codes, const float* x, uint32_t top, const uint32_t* words, int64_t n) {
  if (top > kInfinity || top < as_bits(0x1p-125f)) {
    std::memset(codes, 0, n);
    return top > kInfinity ? as_float(0x7fc00000) : 0.0f;
  }
  const float largest = as_float(top) < 0x1p126f ? as_float(top) : 0x1p126f;
  const float inverse = 1.875f / largest;
  const float least = as_float(static_cast<uint32_t>(127 + 1 - kBias) << 23);       // 2^(1 - bias), least normal number
  const float fixed_point = as_float(static_cast<uint32_t>(127 + 22 + kBias) << 23);  // 2^(22 + bias)
  for (int64_t i = 0; i < n; ++i) {
    const float y = as_float(as_bits(x[i]) & kMagnitude) * inverse;
    const float low = y < least ? y : least;
    const auto subnormal = static_cast<uint32_t>(static_cast<int32_t>(low * fixed_point));
    const uint32_t normal = as_bits(y) - (static_cast<uint32_t>(127 - kBias) << 23);
    const uint32_t fixed = y < least ? subnormal : normal;
    uint32_t code = (fixed + ((words[i] >> kShift & 0xff) << 12) + 2048) >> 20;
    code = code < kCodes - 1 ? code : kCodes - 1;
    const uint32_t bits = as_bits(x[i]), sign = kCodes == 128 ? bits >> 24 & 0x80 : 0;
    if (kCodes == 256) code = code == 0 && bits != 0 ? 1 : code;  // squares > 0 never become 0; none is -0
    codes[i] = static_cast<uint8_t>(code | sign);
  }
  return largest / 1.875f;
}

// Asks for the elements of a block, which may lie beyond the end. A processor's own prefetch stops at a page's end.
inline void prefetch(const void* base, int64_t bytes, int64_t begin) {
  for (int64_t i = 0; i < kStepBlock * bytes; i += 64) __builtin_prefetch(at(base, begin * bytes + i));
}

void block_of(const StepTensors& t, const StepConstants& c, const uint32_t* words, int64_t begin, int64_t n) {
  alignas(64) float h[kStepBlock], wide[kStepBlock], w[kStepBlock], m[kStepBlock], v[kStepBlock];
  const bool in_place = t.score_format == ScoreFormat::kFloat32;
  float* s = in_place ? static_cast<float*>(t.scores) + begin : wide;
  auto* mean_codes = static_cast<uint8_t*>(t.exp_avg) + begin;
  auto* square_codes = static_cast<uint8_t*>(t.exp_avg_sq) + begin;
  float& mean_scale = t.mean_scales[begin / kStepBlock];
  float& square_scale = t.square_scales[begin / kStepBlock];
  prefetch(t.scores, t.score_format == ScoreFormat::kFloat32 ? 4 : 2, begin + kStepChunk);
  prefetch(t.grad, bytes_of(t.grad_format), begin + kStepChunk);
  if (t.weight != nullptr) prefetch(t.weight, bytes_of(t.weight_format), begin + kStepChunk);
  if (!in_place) load_scores(s, t, begin, n);
  load_gradient(h, w, t, s, c, false, begin, n);
  if (t.weight != nullptr) {
    widen(w, at(t.weight, begin * bytes_of(t.weight_format)), t.weight_format, n);
  } else {
    for (int64_t i = 0; i < n; ++i) w[i] = 1.0f;  // products with 1 are exact
  }
  const StepConstants k = c;  // a copy: s cannot alias it
  const float mean = mean_scale, square = square_scale, decay = c.decays ? c.decay : 1.0f;
  uint32_t top_mean = 0, top_square = 0;  // bit patterns order like their values, NaN above all
  for (int64_t i = 0; i < n; ++i) {
    m[i] = decode<15, 128>(mean_codes[i]) * mean * k.beta1 + h[i] * k.one_minus_beta1;
    v[i] = decode<31, 256>(square_codes[i]) * square * k.beta2 + h[i] * h[i] * k.one_minus_beta2;
    const uint32_t mean_bits = as_bits(m[i]) & kMagnitude, square_bits = as_bits(v[i]) & kMagnitude;
    top_mean = mean_bits > top_mean ? mean_bits : top_mean;
    top_square = square_bits > top_square ? square_bits : top_square;
    const float size = as_float(as_bits(w[i]) & kMagnitude);
    s[i] = s[i] * decay + m[i] * w[i] * k.minus_step_size / (std::sqrt(v[i]) * size * k.correction + k.eps);
  }
  mean_scale = encode<15, 128, 16>(mean_codes, m, top_mean, words, n);
  square_scale = encode<31, 256, 24>(square_codes, v, top_square, words, n);
  if (!in_place) store_scores(t, s, words, begin, n);
}

void chunk_of(const StepTensors& t, const StepConstants& c, int64_t begin, int64_t n) {
  alignas(64) uint32_t words[kStepChunk];
  random_words(words, c, begin);
  for (int64_t done = 0; done < n; done += kStepBlock) {
    block_of(t, c, words + done, begin + done, n - done < kStepBlock ? n - done : kStepBlock);
  }
}

}  // namespace

const StepKernels& MFT_STEP_KERNELS() {
  static const StepKernels table = {moments_of, scores_of, chunk_of};
  return table;
}

}  // namespace mft
