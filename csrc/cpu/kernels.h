// The inner loops, one set per instruction-set level, and the choice among them.  Included by files that are compiled with
// AVX flags: nothing but <cstdint> may come in here, or the linker may keep an AVX copy of somebody's inline function.
#pragma once
#include <cstdint>

namespace lora_kernels::cpu {

struct Kernels {
  const char* name;
  bool bf16_dot;  // the CPU multiplies bf16 natively

  // Full blocks [b0, b1) of x (dtype by suffix) -> packed, absmax.  midpoints [15] ascending; order [16]: sorted position ->
  // 4-bit index.  False if a value is not finite.
  bool (*quantize_f32)(const void* x, int64_t b0, int64_t b1, int64_t blocksize, const float* midpoints, const uint8_t* order,
                       uint8_t* packed, float* absmax);
  bool (*quantize_f16)(const void* x, int64_t b0, int64_t b1, int64_t blocksize, const float* midpoints, const uint8_t* order,
                       uint8_t* packed, float* absmax);
  bool (*quantize_bf16)(const void* x, int64_t b0, int64_t b1, int64_t blocksize, const float* midpoints, const uint8_t* order,
                        uint8_t* packed, float* absmax);

  // out[i - i0] = code2[absmax_u8[i]] * absmax2[i / 256] + offset for i in [i0, i1), two roundings.
  void (*decode_absmax)(const uint8_t* absmax_u8, const float* absmax2, const float* code2, float offset, int64_t i0,
                        int64_t i1, float* out);

  // Elements [e0, e1) of the flattened weight -> out[0 .. e1 - e0).  codebook [16], absmax [n_blocks], blocks of 1 << shift.
  // The suffix names the dtype a value is rounded to; `as_f32` stores it widened back to float32.
  void (*decode_f32)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0, int64_t e1,
                     void* out);
  void (*decode_f16)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0, int64_t e1,
                     void* out);
  void (*decode_bf16)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0, int64_t e1,
                      void* out);
  void (*decode_f16_as_f32)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0,
                            int64_t e1, void* out);
  void (*decode_bf16_as_f32)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0,
                             int64_t e1, void* out);

  // out[i] = value[i] where element e0 + i of the mask is kept, else 0.  Philox 4x32-10: key = seed, counter = element / 4,
  // word = element % 4, kept when word >= threshold.
  void (*drop_f32)(const float* value, uint64_t seed, uint64_t threshold, int64_t e0, int64_t n, float* out);
};

// The kernels of the best level that this CPU has, or of the one that LORA_KERNELS_CPU_ISA names.
// Throws std::invalid_argument if that is unknown or not supported here.
const Kernels& kernels();
// Levels this CPU supports, best first; returns how many.
int supported_levels(const Kernels* out[4]);

extern const Kernels portable_kernels;
#ifdef LORA_KERNELS_X86
extern const Kernels avx2_kernels, avx512_kernels, avx512bf16_kernels;
#endif

}  // namespace lora_kernels::cpu
