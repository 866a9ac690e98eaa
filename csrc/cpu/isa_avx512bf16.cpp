#include "avx512_impl.h"

namespace lora_kernels::cpu {
const Kernels avx512bf16_kernels = make_kernels("avx512bf16", true);
}
