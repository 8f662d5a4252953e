// Conversions between fp32 and the 16-bit formats, per instruction set.
//
// Included into an anonymous namespace of namespace mft, after row_kernels.h and <cstring>.

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bfloat16(uint16_t h) { return as_float(static_cast<uint32_t>(h) << 16); }

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float from_float16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fff;
  // A subnormal counts steps of 2^-24, as the fraction of 0.5 does. So no fp32 subnormal arises, which the processor
  // might flush to 0.
  const uint32_t small = as_bits(as_float(magnitude + 0x3f000000) - 0.5f);
  const uint32_t finite = magnitude < 0x0400 ? small : (magnitude << 13) + 0x38000000;  // biases differ by 112
  const uint32_t bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : finite;
  return as_float(bits | static_cast<uint32_t>(h & 0x8000) << 16);
}

inline uint16_t to_float16(float value) {  // to nearest, ties to even
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {   // below 2^-14: subnormal; the sum with 0.5 rounds at the right bit
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

inline void widen(float* out, const void* in, Format format, int64_t n) {
  if (format == Format::kFloat32) {
    std::memcpy(out, in, n * sizeof(float));
  } else if (format == Format::kBFloat16) {
    for (int64_t j = 0; j < n; ++j) out[j] = from_bfloat16(static_cast<const uint16_t*>(in)[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = from_float16(static_cast<const uint16_t*>(in)[j]);
  }
}

inline void narrow(void* out, const float* in, Format format, int64_t n) {
  if (format == Format::kFloat32) {
    std::memcpy(out, in, n * sizeof(float));
  } else if (format == Format::kBFloat16) {
    for (int64_t j = 0; j < n; ++j) static_cast<uint16_t*>(out)[j] = to_bfloat16(in[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) static_cast<uint16_t*>(out)[j] = to_float16(in[j]);
  }
}
