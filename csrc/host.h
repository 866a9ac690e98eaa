// Every op on tensors, of a CPU or of a CUDA device, of any strides: what lora_kernels/backends/native.py calls.  Arguments
// have passed the contract (lora_kernels/ops.py).
#pragma once
#include <string>
#include <vector>

#include "layer.h"

namespace lora_kernels {

// packed [ceil(numel / 2)], absmax [n_blocks], absmax2 and offset; `code2` absent: no double quantization.
// Throws std::invalid_argument if the weight holds NaN or infinity.
using Quantized = std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor>;
Quantized quantize(const Tensor& weight, const std::string& quant_type, int64_t blocksize, const OptionalTensor& code2);

// float32 [n_blocks]
Tensor decode_absmax(const Tensor& absmax, const Tensor& absmax2, const Tensor& code2, const Tensor& offset);

// [*shape] of `dtype`
Tensor dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& code2,
                  const OptionalTensor& offset, const std::vector<int64_t>& shape, const std::string& quant_type,
                  int64_t blocksize, at::ScalarType dtype);

// y [*, N] and h [M, r] of each layer, for x [*, K].
using Outputs = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;
Outputs qlora_linear(const Tensor& x, const std::vector<Layer>& layers);

// dx [*, K], the sum over the layers, then dA, dB and dbias of each; for dy [*, N] and h [M, r] of each layer, and x [*, K].
// `needs` says of each which of dA, dB, dbias are wanted.
using Gradients =
    std::tuple<OptionalTensor, std::vector<OptionalTensor>, std::vector<OptionalTensor>, std::vector<OptionalTensor>>;
Gradients qlora_linear_backward(const std::vector<Tensor>& dys, const OptionalTensor& x, const std::vector<OptionalTensor>& hs,
                                const std::vector<Layer>& layers, bool need_dx, const std::vector<std::array<bool, 3>>& needs);

// y [*, N] of each layer with its gradient, as lora_kernels/autograd.py defines it; a seed that is missing is drawn.  Nothing
// where something watches the call or an argument is not what contract.h asks for.
std::optional<std::vector<Tensor>> qlora_linear_autograd(Tensor x, std::vector<Layer> layers);

}  // namespace lora_kernels
