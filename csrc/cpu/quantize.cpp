// weight -> 4-bit codes and scales, bit for bit what bitsandbytes computes on the CPU.
//
// A full block is multiplied by the reciprocal of its largest magnitude, a short last block is divided by it; how many
// midpoints between neighbouring values of the format lie below says its code.  1e-38 stands in for smaller scales.
#include <atomic>
#include <cmath>
#include <cstring>

#include "../ops.h"
#include "convert.h"
#include "kernels.h"
#include "parallel.h"

namespace lora_kernels::cpu {

namespace {

int nearest(const Format& format, float v) {
  int i = 0;
  for (float m : format.midpoints) i += m < v;
  return format.order[i];
}

template <class D>
bool quantize_short_block(const void* x_, int64_t n, const Format& format, uint8_t* packed, float* absmax) {
  const typename D::T* x = static_cast<const typename D::T*>(x_);
  uint32_t largest = bits(1e-38f);
  for (int64_t i = 0; i < n; i++) largest = std::max(largest, bits(D::load(x[i])) & 0x7fffffff);
  *absmax = from_bits(largest);
  auto code = [&](int64_t i) { return nearest(format, i < n ? D::load(x[i]) / *absmax : 0.0f); };
  for (int64_t i = 0; i < n; i += 2) packed[i / 2] = pack_codes(code(i), code(i + 1));
  return largest < 0x7f800000;
}

}  // namespace

bool quantize(Dense weight, int64_t numel, const Format& format, int64_t blocksize, uint8_t* packed, float* absmax) {
  const Kernels& k = kernels();
  const auto blocks = weight.dtype == DType::f32   ? k.quantize_f32
                      : weight.dtype == DType::f16 ? k.quantize_f16
                                                   : k.quantize_bf16;
  const int64_t full = numel / blocksize, rest = numel % blocksize;
  std::atomic<bool> finite{true};
  parallel(full, ceil_div(16384, blocksize), [&](int64_t b0, int64_t b1) {
    if (!blocks(weight.data, b0, b1, blocksize, format.midpoints, format.order, packed, absmax)) finite = false;
  });
  if (rest == 0) return finite;
  const auto short_block = weight.dtype == DType::f32   ? quantize_short_block<F32>
                           : weight.dtype == DType::f16 ? quantize_short_block<F16>
                                                        : quantize_short_block<BF16>;
  const char* tail = static_cast<const char*>(weight.data) + full * blocksize * itemsize(weight.dtype);
  return short_block(tail, rest, format, packed + full * blocksize / 2, absmax + full) && finite;
}

// bitsandbytes does not search for the nearest entry of code2 but looks it up through 65536 equal steps of [-1, 1].
void quantize_absmax(const float* absmax, int64_t n_blocks, float offset, const float* code2, uint8_t* absmax_u8,
                     float* absmax2) {
  constexpr int STEPS = 65536;
  static thread_local Scratch scratch;
  uint8_t* index = scratch.get<uint8_t>(STEPS);
  for (int i = 0, c = 0; i < STEPS; i++) {
    const float v = -1.0f + (2.0f * i) / (STEPS - 1);
    while (c < 255 && 0.5f * (code2[c] + code2[c + 1]) < v) c++;
    index[i] = static_cast<uint8_t>(c);
  }
  parallel(ceil_div(n_blocks, 256), 16, [&](int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; g++) {
      const int64_t begin = 256 * g, end = std::min(n_blocks, begin + 256);
      float largest = 0;
      for (int64_t i = begin; i < end; i++) largest = std::max(largest, std::fabs(absmax[i] - offset));
      absmax2[g] = largest;
      if (largest == 0) {
        std::memset(absmax_u8 + begin, 0, static_cast<size_t>(end - begin));
        continue;
      }
      const float reciprocal = 1.0f / largest;
      for (int64_t i = begin; i < end; i++) {
        const float v = std::min(1.0f, std::max(-1.0f, (absmax[i] - offset) * reciprocal));
        absmax_u8[i] = index[static_cast<uint16_t>(std::fma((v + 1.0f) * 0.5f, STEPS - 1.0f, 0.5f))];
      }
    }
  });
}

}  // namespace lora_kernels::cpu
