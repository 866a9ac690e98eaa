// 4-bit weight -> dense: code * absmax in float32, rounded once.  Stores that bypass the caches gain nothing: a large output is
// fresh memory, and the first touch of its pages takes most of the time.
#include "../ops.h"
#include "kernels.h"
#include "parallel.h"

namespace lora_kernels::cpu {

static constexpr int64_t UNIT = 1 << 16;  // elements a thread takes at a time, a whole number of blocks

void dequantize(const Weight& w, DType dtype, void* out) {
  const Kernels& k = kernels();
  const auto decode = dtype == DType::f32 ? k.decode_f32 : dtype == DType::f16 ? k.decode_f16 : k.decode_bf16;
  const int64_t numel = w.numel(), size = itemsize(dtype);
  const int shift = w.shift();

  with_team(ceil_div(numel, UNIT), [&](Team& team) {
    static thread_local Scratch scratch;
    team.share(ceil_div(numel, UNIT), [&](int64_t unit) {
      const int64_t begin = unit * UNIT, end = std::min(numel, begin + UNIT);
      const int64_t b0 = begin >> shift, b1 = ceil_div(end, w.blocksize);
      const float* absmax = w.absmax ? w.absmax + b0 : nullptr;
      if (!absmax) {
        float* decoded = scratch.get<float>(b1 - b0);
        k.decode_absmax(w.absmax_u8, w.absmax2, w.code2, *w.offset, b0, b1, decoded);
        absmax = decoded;
      }
      decode(w.packed + begin / 2, w.format->code, absmax, shift, 0, end - begin, static_cast<char*>(out) + begin * size);
    });
  });
}

}  // namespace lora_kernels::cpu
