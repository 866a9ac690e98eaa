// The contract of the linear layer a second time: which calls `qlora_linear_autograd` may compute without Python looking at
// them.
//
// The contract is lora_kernels/ops.py.  Its checks raise; each check here has the name of the one there that it repeats, and
// says false wherever that would raise.  Saying false is always safe: the call then goes through Python, which computes it or
// raises the error.  tests/backends/test_contract.py holds both to the same answers.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cmath>
#include <vector>

#include "layer.h"

namespace lora_kernels::contract {

// ---- what Python's types, devices and dispatcher settle

// A plain CPU tensor with memory of its own: no subclass, no wrapper of torch.func, no fake or lazily negated one.
inline bool is_plain(const Tensor& t) {
  constexpr auto usual = c10::DispatchKeySet(
      {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
  return (t.key_set().raw_repr() & ~usual.raw_repr()) == 0;
}

// A plain one of a dtype that is computed with, along which no forward-mode gradient goes.
inline bool is_float(const Tensor& t) {
  return is_plain(t) && !t._fw_grad(0).defined() &&
         (t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16);
}

inline bool holds(const OptionalTensor& t, at::ScalarType dtype, int64_t numel) {
  return t && is_plain(*t) && t->scalar_type() == dtype && t->numel() == numel;
}

// A dispatch mode or torch.func wants to see every op that is called.
inline bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// ---- the checks of lora_kernels/ops.py

// ops._check_weight; that the format exists has been seen when the layer was unpacked.
inline bool check_weight(const Layer& l) {
  const auto [N, K] = l.shape;
  if (N < 1 || K < 1) return false;
  if (l.blocksize < 1 || (l.blocksize & (l.blocksize - 1)) || !(l.blocksize & l.quant_type->blocksizes)) return false;
  int64_t numel = 0;
  if (__builtin_mul_overflow(N, K, &numel)) return false;
  const int64_t n_blocks = (numel - 1) / l.blocksize + 1;
  if (!is_plain(l.packed) || static_cast<int64_t>(l.packed.nbytes()) != numel / 2 + numel % 2) return false;
  if (!l.absmax2) return !l.code2 && !l.offset && holds(l.absmax, at::kFloat, n_blocks);
  return holds(l.absmax, at::kByte, n_blocks) && holds(l.absmax2, at::kFloat, (n_blocks + 255) / 256) &&
         holds(l.code2, at::kFloat, 256) && holds(l.offset, at::kFloat, 1);
}

// ops._check_input; leading dimensions of x are any.
inline bool check_input(const Tensor& x, const Layer& l) {
  return is_float(x) && x.dim() > 0 && x.size(-1) == l.shape[1] && check_weight(l);
}

// ops._check_parameter
inline bool check_parameter(const Tensor& t, at::IntArrayRef shape) { return is_float(t) && t.sizes() == shape; }

// ops._check_lora; a seed may still have to be drawn.
inline bool check_lora(const Layer& l) {
  const auto [N, K] = l.shape;
  const OptionalTensor &A = l.lora_A, &B = l.lora_B;
  if (A.has_value() != B.has_value() || !std::isfinite(l.scaling)) return false;
  if (!(0 <= l.dropout_p && l.dropout_p < 1)) return false;
  if (!A) return l.dropout_p == 0;
  const int64_t r = A->dim() == 2 ? A->size(0) : 0;
  if (r == 0 || !check_parameter(*A, {r, K}) || !check_parameter(*B, {N, r})) return false;
  return l.dropout_p == 0 || !l.seed || holds(l.seed, at::kLong, 1);
}

// ops.check_qlora_linear
inline bool check_qlora_linear(const Tensor& x, const std::vector<Layer>& layers) {
  for (const Layer& l : layers) {
    if (!check_input(x, l) || !check_lora(l)) return false;
    if (l.bias && !check_parameter(*l.bias, {l.shape[0]})) return false;
  }
  return !layers.empty();
}

}  // namespace lora_kernels::contract
