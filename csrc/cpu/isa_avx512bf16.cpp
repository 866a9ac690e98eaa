#include "avx512_impl.h"
// after it, for its loads and stores
#include "avx512bf16_gemm.h"

namespace lora_kernels::cpu {
const Kernels avx512bf16_kernels =
    make_kernels("avx512bf16", make_gemm_f32(transpose_wide<uint32_t>, interleave_wide), GEMM_BF16, dots<DotsBF16>);
}
