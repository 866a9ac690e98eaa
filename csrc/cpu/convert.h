// Scalar conversions between float32 and the 16-bit formats, round to nearest even.  Internal linkage: files
// that are compiled with AVX flags include this (kernels.h says why).
#pragma once
#include <cstdint>

namespace lora_kernels::cpu {
namespace {

[[maybe_unused]] inline uint32_t bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

[[maybe_unused]] inline float from_bits(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

struct F32 {
  using T = float;
  static float load(float v) { return v; }
  static float store(float v) { return v; }
};

struct BF16 {
  using T = uint16_t;
  static float load(uint16_t v) { return from_bits(static_cast<uint32_t>(v) << 16); }
  static uint16_t store(float v) {
    const uint32_t u = bits(v);
    if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(u >> 16 | 0x40);  // NaN stays NaN
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
};

struct F16 {
  using T = uint16_t;
  static float load(uint16_t v) {
    const uint32_t sign = static_cast<uint32_t>(v & 0x8000) << 16, magnitude = v & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | magnitude << 13);
    if (magnitude >= 0x0400) return from_bits(sign | (magnitude + (112 << 10)) << 13);
    return from_bits(sign | bits(static_cast<float>(magnitude) * 0x1p-24f));
  }
  static uint16_t store(float v) {
    const uint16_t sign = static_cast<uint16_t>(bits(v) >> 16 & 0x8000);
    const uint32_t u = bits(v) & 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x47800000) return sign | 0x7c00;  // 65536 and up
    if (u < 0x38800000)                         // below 2^-14: adding 0.5 leaves the rounded denormal in the low bits
      return static_cast<uint16_t>(sign | (bits(from_bits(u) + 0.5f) - bits(0.5f)));
    return static_cast<uint16_t>(sign | (u - (112u << 23) + 0xfff + (u >> 13 & 1)) >> 13);
  }
};

}  // namespace
}  // namespace lora_kernels::cpu
