// The linear layer on a few rows of x.
#pragma once
#include "../ops.h"

namespace lora_kernels::cpu {

// Whether `qlora_linear_dots` takes M rows: it is faster there than the packed product.
bool takes_dots(int64_t M, const Weight& weight);

void qlora_linear_dots(DType dtype, int64_t M, const void* x, const Layer& layer);

}  // namespace lora_kernels::cpu
