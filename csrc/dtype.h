// The dtypes of dense tensors; alone in a file because the ISA files may include nothing that has inline functions.
#pragma once

namespace lora_kernels {

enum class DType { f32, f16, bf16 };

}
