// The product of many rows with the weight on a CUDA device: by torch's library, which reads decoded panels of the weight.
#pragma once
#include <ATen/ATen.h>

#include "ops.h"

namespace lora_kernels::panels {

// Whether M rows like those of x are multiplied so.
bool takes(const at::Tensor& x, int64_t M);

// y [M, N] += x [M, K] W^T, both of the dtype in which W is decoded.
void add_forward(const cuda::Context& context, const Weight& W, const at::Tensor& x, const at::Tensor& y);

// dx [M, K] += dy [M, N] W
void add_backward(const cuda::Context& context, const Weight& W, const at::Tensor& dy, const at::Tensor& dx);

}  // namespace lora_kernels::panels
