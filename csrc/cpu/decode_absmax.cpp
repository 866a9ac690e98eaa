// Double-quantized scales -> float32: code2[absmax_u8] * absmax2, rounded, + offset, rounded (built without FMA contraction).
#include "../ops.h"
#include "kernels.h"
#include "parallel.h"

namespace lora_kernels::cpu {

void decode_absmax(const Weight& w, float* out) {
  const auto decode = kernels().decode_absmax;
  parallel(ceil_div(w.n_blocks(), 256), 64, [&](int64_t g0, int64_t g1) {
    decode(w.absmax_u8, w.absmax2, w.code2, *w.offset, 256 * g0, std::min(w.n_blocks(), 256 * g1), out + 256 * g0);
  });
}

}  // namespace lora_kernels::cpu
