// 4-bit weight -> dense: code * absmax in float32, rounded once.
#include "decoder.h"

namespace lora_kernels::cpu {

void dequantize(const Weight& w, DType dtype, void* out) {
  static thread_local Scratch scratch;
  const Decoder decoder(w, scratch);
  constexpr int64_t UNIT = 4096;  // a whole number of blocks, and of cache lines
  parallel(ceil_div(w.numel(), UNIT), 4, [&](int64_t u0, int64_t u1) {
    const int64_t begin = UNIT * u0, end = std::min(w.numel(), UNIT * u1);
    decoder.elements(dtype, false, begin, end, static_cast<char*>(out) + begin * itemsize(dtype));
  });
}

}  // namespace lora_kernels::cpu
