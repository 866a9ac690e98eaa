// The gradient of the linear layer without entering Python, which costs more than a small layer.  What is computed, and what is
// saved for it, is what lora_kernels/autograd.py says.
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <cmath>
#include <utility>

#include "bindings.h"

namespace lora_kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a layer brings besides x and the tensors that can be trained.
struct Frozen {
  const Tensor &packed, &absmax;
  const OptionalTensor &absmax2, &code2, &offset;
  const std::vector<int64_t>& shape;
  const std::string& quant_type;
  int64_t blocksize;
  double scaling, dropout_p;
  const OptionalTensor& seed;
};

// ---- which calls are taken

// A plain CPU tensor with memory of its own: no subclass, no wrapper of torch.func, no fake or lazily negated one.
bool plain(const Tensor& t) {
  constexpr auto usual = c10::DispatchKeySet(
      {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
  return (t.key_set().raw_repr() & ~usual.raw_repr()) == 0;
}

bool floating(const Tensor& t) {
  return plain(t) && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16);
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

bool fits(const Frozen& f) {
  if (f.shape.size() != 2 || f.shape[0] < 1 || f.shape[1] < 1 || (f.quant_type != "nf4" && f.quant_type != "fp4")) return false;
  if (f.blocksize < 32 || f.blocksize > 4096 || (f.blocksize & (f.blocksize - 1))) return false;
  const int64_t numel = f.shape[0] * f.shape[1], n_blocks = (numel + f.blocksize - 1) / f.blocksize;
  if (!plain(f.packed) || static_cast<int64_t>(f.packed.nbytes()) != (numel + 1) / 2) return false;
  if (!f.absmax2) return has(f.absmax, at::kFloat, n_blocks);
  return has(f.absmax, at::kByte, n_blocks) && has(f.absmax2, at::kFloat, (n_blocks + 255) / 256) &&
         has(f.code2, at::kFloat, 256) && has(f.offset, at::kFloat, 1);
}

bool takes(const Tensor& x, const Frozen& f, const OptionalTensor& A, const OptionalTensor& B, const OptionalTensor& bias) {
  if (watched() || !floating(x) || !fits(f)) return false;
  const int64_t N = f.shape[0], K = f.shape[1];
  if (x.dim() == 0 || x.size(-1) != K || !std::isfinite(f.scaling)) return false;
  if (bias && !(floating(*bias) && bias->dim() == 1 && bias->size(0) == N)) return false;
  if (!A || !B) return !A && !B && f.dropout_p == 0;
  const int64_t r = A->dim() == 2 ? A->size(0) : 0;
  if (r == 0 || !matrix(A, r, K) || !matrix(B, N, r)) return false;
  return f.dropout_p == 0 || (f.dropout_p > 0 && f.dropout_p < 1 && has(f.seed, at::kLong, 1));
}

// ---- forward and backward

Tensor tensor(const OptionalTensor& t) { return t ? *t : Tensor(); }
OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& A, const OptionalTensor& B,
                                   const OptionalTensor& bias, const Frozen& f) {
  return qlora_linear(x, f.packed, f.absmax, f.absmax2, f.code2, f.offset, f.shape, f.quant_type, f.blocksize, A, B, f.scaling,
                      bias, f.dropout_p, f.seed);
}

class QLoRALinear : public torch::autograd::Function<QLoRALinear> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& A, const OptionalTensor& B,
                        const OptionalTensor& bias, const Frozen& f) {
    auto [y, h] = lora_kernels::forward(x, A, B, bias, f);
    ctx->save_for_backward({A && A->requires_grad() ? x : Tensor(), B && B->requires_grad() ? h : Tensor(), tensor(A),
                            tensor(B), f.packed, f.absmax, tensor(f.absmax2), tensor(f.code2), tensor(f.offset),
                            tensor(f.seed)});
    ctx->saved_data["shape"] = f.shape;
    ctx->saved_data["quant_type"] = f.quant_type;
    ctx->saved_data["blocksize"] = f.blocksize;
    ctx->saved_data["scaling"] = f.scaling;
    ctx->saved_data["dropout_p"] = f.dropout_p;
    if (bias) ctx->saved_data["bias"] = bias->scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const Tensor& dy = dys[0];
    TORCH_CHECK(plain(dy), "qlora_linear: the gradient of the output must be a plain CPU tensor, got ", dy.toString());
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor x = optional(saved[0]), h = optional(saved[1]), A = optional(saved[2]), B = optional(saved[3]);
    auto& data = ctx->saved_data;
    const bool bias = data.count("bias");
    // edges are those of the tensors that were given: x, A and B, bias
    const std::array<bool, 4> needs = {ctx->needs_input_grad(0), A && ctx->needs_input_grad(1), B && ctx->needs_input_grad(2),
                                       bias && ctx->needs_input_grad(A ? 3 : 1)};
    Gradients grads;
    {
      at::NoGradGuard no_grad;
      grads =
          qlora_linear_backward(dy, needs[1] ? x : std::nullopt, needs[2] ? h : std::nullopt, saved[4], saved[5],
                                optional(saved[6]), optional(saved[7]), optional(saved[8]), data["shape"].toIntVector(),
                                data["quant_type"].toStringRef(), data["blocksize"].toInt(), A, B, data["scaling"].toDouble(),
                                data["dropout_p"].toDouble(), optional(saved[9]), needs, std::nullopt);
      auto& dbias = std::get<3>(grads);
      if (dbias) dbias = dbias->to(data["bias"].toScalarType());
    }
    auto& [dx, dA, dB, dbias] = grads;
    return once({tensor(dx), tensor(dA), tensor(dB), tensor(dbias)}, dy);
  }

 private:
  // Gradients that refuse to be differentiated again, as torch.autograd.function.once_differentiable makes them.
  static variable_list once(variable_list grads, const Tensor& dy) {
    if (at::GradMode::is_enabled() && dy.requires_grad()) {
      for (auto& g : grads)
        if (g.defined()) g.set_requires_grad(true);
      grads = torch::autograd::DelayedError(
                  "trying to differentiate twice a function that was marked with @once_differentiable", grads.size())
                  .apply(std::move(grads));
    }
    grads.emplace_back();  // of Frozen
    return grads;
  }
};

}  // namespace

OptionalTensor qlora_linear_autograd(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                                     const OptionalTensor& code2, const OptionalTensor& offset,
                                     const std::vector<int64_t>& shape, const std::string& quant_type, int64_t blocksize,
                                     const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
                                     const OptionalTensor& bias, double dropout_p, const OptionalTensor& seed) {
  const Frozen frozen{packed, absmax, absmax2, code2, offset, shape, quant_type, blocksize, scaling, dropout_p, seed};
  if (!takes(x, frozen, lora_A, lora_B, bias)) return std::nullopt;
  RECORD_FUNCTION("lora_kernels::qlora_linear", std::vector<c10::IValue>());
  if (at::GradMode::is_enabled()) return QLoRALinear::apply(x, lora_A, lora_B, bias, frozen);
  return std::get<0>(forward(x, lora_A, lora_B, bias, frozen));
}

}  // namespace lora_kernels
