#include "avx512_impl.h"
// after it, for its loads and stores
#include "avx512bf16_gemm.h"

namespace lora_kernels::cpu {
const Kernels avx512bf16_kernels = make_kernels("avx512bf16", GEMM_F32, GEMM_BF16, dots<DotsBF16>);
}
