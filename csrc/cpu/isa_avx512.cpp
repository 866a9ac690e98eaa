#include "avx512_impl.h"

namespace lora_kernels::cpu {
const Kernels avx512_kernels = make_kernels("avx512", GEMM_F32, Gemm{}, dots<DotsF32<BF16>>);
}
