// Level "avx512": AVX-512 F, BW, VL and DQ.
#include "../loops/weight.h"
#include "avx512_products.h"
#include "avx512_weight.h"

namespace lora_kernels::cpu {

constexpr Kernels avx512_kernels =
    make_kernels<V, DotsF32>("avx512", make_gemm_f32<MathF32, DotsF32>(transpose_wide<uint32_t>, interleave_wide));

}  // namespace lora_kernels::cpu
