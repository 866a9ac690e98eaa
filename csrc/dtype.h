// The dtypes of dense tensors; alone in a file because files that are compiled with AVX flags may
// include nothing that has inline functions (csrc/cpu/kernels.h says why).
#pragma once

namespace lora_kernels {

enum class DType { f32, f16, bf16 };

}
