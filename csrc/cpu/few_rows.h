// The linear layer on a few rows of x.
#pragma once
#include <vector>

#include "../ops.h"

namespace lora_kernels::cpu {

// Whether `qlora_linear_few_rows` takes M rows by this weight.
bool takes_few_rows(DType dtype, int64_t M, const Weight& weight);

void qlora_linear_few_rows(DType dtype, int64_t M, const void* x, const std::vector<Layer>& layers);

}  // namespace lora_kernels::cpu
