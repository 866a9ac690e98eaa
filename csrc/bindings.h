// The linear layer on tensors of any strides.
#pragma once
#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace lora_kernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// x [*, K] -> y [*, N], h [M, r].
std::tuple<Tensor, Tensor> qlora_linear(Tensor x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                                        const OptionalTensor& code2, const OptionalTensor& offset,
                                        const std::vector<int64_t>& shape, const std::string& quant_type, int64_t blocksize,
                                        OptionalTensor lora_A, OptionalTensor lora_B, double scaling, OptionalTensor bias,
                                        double dropout_p, const OptionalTensor& seed);

// dx, dA, dB, dbias
using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

// dy [*, N], x [*, K], h [M, r] -> dx [*, K].  `dx`, if given, is float32 and is added to.
Gradients qlora_linear_backward(Tensor dy, OptionalTensor x, OptionalTensor h, const Tensor& packed, const Tensor& absmax,
                                const OptionalTensor& absmax2, const OptionalTensor& code2, const OptionalTensor& offset,
                                const std::vector<int64_t>& shape, const std::string& quant_type, int64_t blocksize,
                                OptionalTensor lora_A, OptionalTensor lora_B, double scaling, double dropout_p,
                                const OptionalTensor& seed, const std::array<bool, 4>& needs, OptionalTensor dx);

// y [*, N] with its gradient, as lora_kernels/autograd.py defines it.  Nothing where the tensors are not plain ones of a CPU,
// something watches the call, or an argument is not what lora_kernels/ops.py asks for.
OptionalTensor qlora_linear_autograd(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                                     const OptionalTensor& code2, const OptionalTensor& offset,
                                     const std::vector<int64_t>& shape, const std::string& quant_type, int64_t blocksize,
                                     const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
                                     const OptionalTensor& bias, double dropout_p, const OptionalTensor& seed);

}  // namespace lora_kernels
