// The gradient of the linear layer without entering Python, which costs more than a small layer.  What is computed, and what is
// saved for it, is what lora_kernels/autograd.py says.
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "bindings.h"

namespace lora_kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- which calls are taken

// A plain CPU tensor with memory of its own: no subclass, no wrapper of torch.func, no fake or lazily negated one.
bool plain(const Tensor& t) {
  constexpr auto usual = c10::DispatchKeySet(
      {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
  return (t.key_set().raw_repr() & ~usual.raw_repr()) == 0;
}

// Whether forward-mode gradients go along with it.
bool dual(const Tensor& t) { return t._fw_grad(0).defined(); }

bool floating(const Tensor& t) {
  return plain(t) && !dual(t) &&
         (t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16);
}

bool has(const OptionalTensor& t, at::ScalarType dtype, int64_t numel) {
  return t && plain(*t) && t->scalar_type() == dtype && t->numel() == numel;
}

bool matrix(const OptionalTensor& t, int64_t rows, int64_t columns) {
  return t && floating(*t) && t->dim() == 2 && t->size(0) == rows && t->size(1) == columns;
}

bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool sound(const Layer& l) {
  const auto [N, K] = l.shape;
  if (N < 1 || K < 1 || (l.quant_type != "nf4" && l.quant_type != "fp4")) return false;
  if (l.blocksize < 32 || l.blocksize > 4096 || (l.blocksize & (l.blocksize - 1))) return false;
  const int64_t numel = N * K, n_blocks = (numel + l.blocksize - 1) / l.blocksize;
  if (!plain(l.packed) || static_cast<int64_t>(l.packed.nbytes()) != (numel + 1) / 2) return false;
  if (!l.absmax2) return has(l.absmax, at::kFloat, n_blocks);
  return has(l.absmax, at::kByte, n_blocks) && has(l.absmax2, at::kFloat, (n_blocks + 255) / 256) &&
         has(l.code2, at::kFloat, 256) && has(l.offset, at::kFloat, 1);
}

bool takes(const Tensor& x, const Layer& l) {
  const auto [N, K] = l.shape;
  if (!sound(l) || x.size(-1) != K || !std::isfinite(l.scaling)) return false;
  if (l.bias && !(floating(*l.bias) && l.bias->dim() == 1 && l.bias->size(0) == N)) return false;
  const OptionalTensor &A = l.lora_A, &B = l.lora_B;
  if (!A || !B) return !A && !B && l.dropout_p == 0;
  const int64_t r = A->dim() == 2 ? A->size(0) : 0;
  if (r == 0 || !matrix(A, r, K) || !matrix(B, N, r)) return false;
  return l.dropout_p == 0 || (l.dropout_p > 0 && l.dropout_p < 1 && (!l.seed || has(l.seed, at::kLong, 1)));
}

// ---- forward and backward

Tensor tensor(const OptionalTensor& t) { return t ? *t : Tensor(); }
OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

bool trained(const OptionalTensor& t) { return t && t->requires_grad(); }

// x and what of each layer can be trained, in the order in which gradients are returned.
variable_list differentiable(const Tensor& x, const std::vector<Layer>& layers) {
  variable_list list{x};
  for (const Layer& l : layers)
    for (const OptionalTensor* t : {&l.lora_A, &l.lora_B, &l.bias})
      if (*t) list.push_back(**t);
  return list;
}

// A layer between forward and backward: tensors, integers and numbers in lists of all layers.
constexpr size_t TENSORS = 9, INTEGERS = 5, NUMBERS = 2;

class QLoRALinear : public torch::autograd::Function<QLoRALinear> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList differentiable, const std::vector<Layer>& layers) {
    const Tensor& x = differentiable[0];
    auto [ys, hs] = qlora_linear(x, layers);
    const bool need_x = std::any_of(layers.begin(), layers.end(), [](const Layer& l) { return trained(l.lora_A); });
    variable_list tensors{need_x ? x : Tensor()};
    std::vector<int64_t> integers;
    std::vector<double> numbers;
    for (size_t i = 0; i < layers.size(); i++) {
      const Layer& l = layers[i];
      tensors.insert(tensors.end(), {trained(l.lora_B) ? hs[i] : Tensor(), l.packed, l.absmax, tensor(l.absmax2),
                                     tensor(l.code2), tensor(l.offset), tensor(l.lora_A), tensor(l.lora_B), tensor(l.seed)});
      const int64_t bias = l.bias ? static_cast<int64_t>(l.bias->scalar_type()) : -1;
      integers.insert(integers.end(), {l.shape[0], l.shape[1], l.quant_type == "nf4", l.blocksize, bias});
      numbers.insert(numbers.end(), {l.scaling, l.dropout_p});
    }
    ctx->save_for_backward(std::move(tensors));
    ctx->saved_data["integers"] = std::move(integers);
    ctx->saved_data["numbers"] = std::move(numbers);
    return std::move(ys);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const auto tensors = ctx->get_saved_variables();
    const auto integers = ctx->saved_data["integers"].toIntVector();
    const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    std::vector<Layer> layers;
    std::vector<OptionalTensor> hs;
    std::vector<std::array<bool, 3>> needs;
    size_t edge = 1;
    for (size_t i = 0; i < dys.size(); i++) {
      TORCH_CHECK(plain(dys[i]), "qlora_linear: the gradient of the output must be a plain CPU tensor, got ",
                  dys[i].toString());
      const Tensor* t = &tensors[1 + TENSORS * i];
      const int64_t* n = &integers[INTEGERS * i];
      hs.push_back(optional(t[0]));
      layers.push_back({t[1],
                        t[2],
                        optional(t[3]),
                        optional(t[4]),
                        optional(t[5]),
                        {n[0], n[1]},
                        n[2] ? "nf4" : "fp4",
                        n[3],
                        optional(t[6]),
                        optional(t[7]),
                        numbers[NUMBERS * i],
                        std::nullopt,
                        numbers[NUMBERS * i + 1],
                        optional(t[8])});
      const bool adapter = t[6].defined(), bias = n[4] >= 0;
      std::array<bool, 3>& need = needs.emplace_back();
      for (const size_t j : {0, 1}) need[j] = adapter && ctx->needs_input_grad(edge + j);
      edge += adapter ? 2 : 0;
      need[2] = bias && ctx->needs_input_grad(edge);
      edge += bias;
    }
    variable_list grads;
    {
      at::NoGradGuard no_grad;
      auto [dx, dAs, dBs, dbiases] =
          qlora_linear_backward(dys, optional(tensors[0]), hs, layers, ctx->needs_input_grad(0), needs);
      grads.push_back(tensor(dx));
      for (size_t i = 0; i < dys.size(); i++) {
        if (layers[i].lora_A) grads.insert(grads.end(), {tensor(dAs[i]), tensor(dBs[i])});
        const int64_t bias = integers[INTEGERS * i + 4];
        if (bias >= 0) grads.push_back(dbiases[i] ? dbiases[i]->to(static_cast<at::ScalarType>(bias)) : Tensor());
      }
    }
    return once(std::move(grads), dys);
  }

 private:
  // Gradients that refuse to be differentiated again, as torch.autograd.function.once_differentiable makes them.
  static variable_list once(variable_list grads, const variable_list& dys) {
    if (at::GradMode::is_enabled() && std::any_of(dys.begin(), dys.end(), [](auto& dy) { return dy.requires_grad(); })) {
      for (auto& g : grads)
        if (g.defined()) g.set_requires_grad(true);
      grads = torch::autograd::DelayedError(
                  "trying to differentiate twice a function that was marked with @once_differentiable", grads.size())
                  .apply(std::move(grads));
    }
    grads.emplace_back();  // of the layers
    return grads;
  }
};

}  // namespace

std::optional<std::vector<Tensor>> qlora_linear_autograd(Tensor x, std::vector<Layer> layers) {
  if (watched() || !floating(x) || x.dim() == 0) return std::nullopt;
  if (!std::all_of(layers.begin(), layers.end(), [&](const Layer& l) { return takes(x, l); })) return std::nullopt;
  RECORD_FUNCTION("lora_kernels::qlora_linear", std::vector<c10::IValue>());
  if (at::autocast::is_autocast_enabled(at::kCPU)) x = x.to(at::autocast::get_autocast_dtype(at::kCPU));
  for (Layer& l : layers)
    if (l.dropout_p > 0 && !l.seed) l.seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, at::kLong);
  if (at::GradMode::is_enabled()) {
    const variable_list inputs = differentiable(x, layers);
    if (std::any_of(inputs.begin(), inputs.end(), [](auto& t) { return t.requires_grad(); }))
      return QLoRALinear::apply(at::TensorList(inputs), layers);
  }
  return std::get<0>(qlora_linear(x, layers));
}

}  // namespace lora_kernels
