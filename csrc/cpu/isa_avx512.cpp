#include "avx512_impl.h"

namespace lora_kernels::cpu {
const Kernels avx512_kernels =
    make_kernels("avx512", make_gemm_f32(transpose_wide<uint32_t>, interleave_wide), Gemm{}, dots<DotsF32<BF16>>);
}
