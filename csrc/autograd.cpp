// The gradient of the linear layer without entering Python, which costs more than a small layer.  What is computed, and what is
// saved for it, is what lora_kernels/autograd.py says.
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "contract.h"
#include "host.h"

namespace lora_kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

// Values of each kind that autograd keeps between forward and backward, written and read in one order.
struct Saved {
  variable_list tensors;
  std::vector<int64_t> integers;
  std::vector<double> numbers;
};

class Writer {
 public:
  explicit Writer(Saved& saved) : saved_(saved) {}
  void operator()(const Tensor& t) { saved_.tensors.push_back(t); }
  void operator()(const OptionalTensor& t) { saved_.tensors.push_back(tensor(t)); }
  void operator()(int64_t n) { saved_.integers.push_back(n); }
  void operator()(double v) { saved_.numbers.push_back(v); }
  void operator()(const std::array<int64_t, 2>& shape) {
    saved_.integers.insert(saved_.integers.end(), shape.begin(), shape.end());
  }
  void operator()(const Format* format) { saved_.integers.push_back(reinterpret_cast<int64_t>(format)); }

 private:
  Saved& saved_;
};

class Reader {
 public:
  explicit Reader(const Saved& saved)
      : tensor_(saved.tensors.data()), integer_(saved.integers.data()), number_(saved.numbers.data()) {}
  void operator()(Tensor& t) { t = *tensor_++; }
  void operator()(OptionalTensor& t) { t = optional(*tensor_++); }
  void operator()(int64_t& n) { n = *integer_++; }
  void operator()(double& v) { v = *number_++; }
  void operator()(std::array<int64_t, 2>& shape) {
    for (int64_t& n : shape) n = *integer_++;
  }
  void operator()(const Format*& format) { format = reinterpret_cast<const Format*>(*integer_++); }

 private:
  const Tensor* tensor_;
  const int64_t* integer_;
  const double* number_;
};

constexpr int64_t NO_BIAS = -1;

class QLoRALinear : public torch::autograd::Function<QLoRALinear> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList differentiable, std::vector<Layer>& layers) {
    const Tensor& x = differentiable[0];
    auto [ys, hs] = qlora_linear(x, layers);
    const bool need_x = std::any_of(layers.begin(), layers.end(), [](const Layer& l) { return trained(l.lora_A); });
    Saved saved;
    const size_t most = 1 + (N_FIELDS + 1) * layers.size();
    saved.tensors.reserve(most);
    saved.integers.reserve(most);
    saved.numbers.reserve(most);
    Writer write(saved);
    write(need_x ? x : Tensor());
    for (size_t i = 0; i < layers.size(); i++) {
      Layer& l = layers[i];
      write(trained(l.lora_B) ? hs[i] : Tensor());
      write(l.bias ? static_cast<int64_t>(l.bias->scalar_type()) : NO_BIAS);
      l.bias.reset();  // backward asks for its dtype alone
      each_field(l, [&](const char*, const auto& field) { write(field); });
    }
    ctx->save_for_backward(std::move(saved.tensors));
    ctx->saved_data["integers"] = std::move(saved.integers);
    ctx->saved_data["numbers"] = std::move(saved.numbers);
    return std::move(ys);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const Saved saved{ctx->get_saved_variables(), ctx->saved_data["integers"].toIntVector(),
                      ctx->saved_data["numbers"].toDoubleVector()};
    Reader read(saved);
    OptionalTensor x;
    read(x);
    std::vector<Layer> layers(dys.size());
    std::vector<OptionalTensor> hs(dys.size());
    std::vector<int64_t> bias_dtypes(dys.size());
    std::vector<std::array<bool, 3>> needs;
    size_t edge = 1;
    for (size_t i = 0; i < dys.size(); i++) {
      TORCH_CHECK(contract::is_plain(dys[i]), "qlora_linear: the gradient of the output must be a plain CPU tensor, got ",
                  dys[i].toString());
      read(hs[i]);
      read(bias_dtypes[i]);
      each_field(layers[i], [&](const char*, auto& field) { read(field); });
      const bool adapter = layers[i].lora_A.has_value(), bias = bias_dtypes[i] != NO_BIAS;
      std::array<bool, 3>& need = needs.emplace_back();
      for (const size_t j : {0, 1}) need[j] = adapter && ctx->needs_input_grad(edge + j);
      edge += adapter ? 2 : 0;
      need[2] = bias && ctx->needs_input_grad(edge);
      edge += bias;
    }
    variable_list grads;
    {
      at::NoGradGuard no_grad;
      auto [dx, dAs, dBs, dbiases] = qlora_linear_backward(dys, x, hs, layers, ctx->needs_input_grad(0), needs);
      grads.push_back(tensor(dx));
      for (size_t i = 0; i < dys.size(); i++) {
        if (layers[i].lora_A) grads.insert(grads.end(), {tensor(dAs[i]), tensor(dBs[i])});
        if (const int64_t dtype = bias_dtypes[i]; dtype != NO_BIAS)
          grads.push_back(dbiases[i] ? dbiases[i]->to(static_cast<at::ScalarType>(dtype)) : Tensor());
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
  if (contract::is_watched() || !contract::check_qlora_linear(x, layers)) return std::nullopt;
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
