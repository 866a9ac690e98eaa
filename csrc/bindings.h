// The linear layer on tensors of any strides: several layers on one x.
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

// What a layer takes besides x.
struct Layer {
  Tensor packed, absmax;
  OptionalTensor absmax2, code2, offset;
  std::array<int64_t, 2> shape;  // N, K
  std::string quant_type;
  int64_t blocksize;
  OptionalTensor lora_A, lora_B;
  double scaling;
  OptionalTensor bias;
  double dropout_p;
  OptionalTensor seed;
};

// y [*, N] and h [M, r] of each layer.
using Outputs = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;

// x [*, K]
Outputs qlora_linear(const Tensor& x, const std::vector<Layer>& layers);

// dx [*, K], the sum over the layers, then dA, dB and dbias of each.
using Gradients =
    std::tuple<OptionalTensor, std::vector<OptionalTensor>, std::vector<OptionalTensor>, std::vector<OptionalTensor>>;

// dy [*, N] and h [M, r] of each layer; x [*, K].  `needs` says of each which of dA, dB, dbias are wanted.
Gradients qlora_linear_backward(const std::vector<Tensor>& dys, const OptionalTensor& x, const std::vector<OptionalTensor>& hs,
                                const std::vector<Layer>& layers, bool need_dx, const std::vector<std::array<bool, 3>>& needs);

// y [*, N] of each layer with its gradient, as lora_kernels/autograd.py defines it; a seed that is missing is drawn.  Nothing
// where the tensors are not plain ones of a CPU, something watches the call, or an argument is not what lora_kernels/ops.py
// asks for.
std::optional<std::vector<Tensor>> qlora_linear_autograd(Tensor x, std::vector<Layer> layers);

}  // namespace lora_kernels
