// The Python module lora_kernels._C: unpacks tensors, allocates outputs, releases the GIL.  No maths here.
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "codebooks.h"
#include "cpu/kernels.h"
#include "ops.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
namespace py = pybind11;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    default:
      throw std::invalid_argument(std::string("dtype must be float32, float16 or bfloat16, got ") +
                                  at::toString(t.scalar_type()));
  }
}

QuantType quant_type_of(const std::string& name) {
  if (name == "nf4") return QuantType::nf4;
  if (name == "fp4") return QuantType::fp4;
  throw std::invalid_argument("quant_type must be nf4 or fp4, got '" + name + "'");
}

Dense dense(const OptionalTensor& t) { return t ? Dense{t->data_ptr(), dtype_of(*t)} : Dense{nullptr, DType::f32}; }

// Holds the tensors of a weight, contiguous, while an op reads them.
class PackedWeight {
 public:
  PackedWeight(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& code2,
               const OptionalTensor& offset, int64_t N, int64_t K, const std::string& quant_type, int64_t blocksize)
      : packed_(packed.contiguous()), absmax_(absmax.contiguous()) {
    weight_ = {packed_.const_data_ptr<uint8_t>(), nullptr, nullptr, nullptr, nullptr, 0, N, K, blocksize,
               quant_type_of(quant_type)};
    if (absmax2) {
      absmax2_ = absmax2->contiguous();
      code2_ = code2.value().contiguous();
      weight_.absmax_u8 = absmax_.const_data_ptr<uint8_t>();
      weight_.absmax2 = absmax2_.const_data_ptr<float>();
      weight_.code2 = code2_.const_data_ptr<float>();
      weight_.offset = *offset.value().const_data_ptr<float>();
    } else {
      weight_.absmax = absmax_.const_data_ptr<float>();
    }
  }
  const Weight& operator*() const { return weight_; }
  const Weight* operator->() const { return &weight_; }

 private:
  Tensor packed_, absmax_, absmax2_, code2_;
  Weight weight_;
};

Adapter adapter(const OptionalTensor& A, const OptionalTensor& B, double scaling, double dropout_p,
                const OptionalTensor& seed) {
  return {dense(A),
          dense(B),
          A ? A->size(0) : 0,
          static_cast<float>(scaling),
          A ? dropout_p : 0.0,
          A && dropout_p > 0 ? static_cast<uint64_t>(*seed.value().const_data_ptr<int64_t>()) : 0};
}

using Quantized = std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor>;

// code2 None: no double quantization.
Quantized quantize(const Tensor& weight, const std::string& quant_type, int64_t blocksize, const OptionalTensor& code2) {
  const QuantType type = quant_type_of(quant_type);
  const DType dtype = dtype_of(weight);
  py::gil_scoped_release no_gil;
  const Tensor w = weight.contiguous();
  const int64_t n_blocks = (w.numel() + blocksize - 1) / blocksize;
  const auto f32 = w.options().dtype(at::kFloat), u8 = w.options().dtype(at::kByte);
  Tensor packed = at::empty({(w.numel() + 1) / 2}, u8), absmax = at::empty({n_blocks}, f32);
  if (!cpu::quantize({w.data_ptr(), dtype}, w.numel(), type, blocksize, packed.data_ptr<uint8_t>(), absmax.data_ptr<float>()))
    throw std::invalid_argument("weight contains NaN or infinity");
  if (!code2) return {packed, absmax, std::nullopt, std::nullopt};
  const Tensor offset = absmax.mean();  // torch's order of summation is part of the format
  Tensor absmax_u8 = at::empty({n_blocks}, u8), absmax2 = at::empty({(n_blocks + 255) / 256}, f32);
  cpu::quantize_absmax(absmax.const_data_ptr<float>(), n_blocks, *offset.const_data_ptr<float>(),
                       code2->contiguous().const_data_ptr<float>(), absmax_u8.data_ptr<uint8_t>(), absmax2.data_ptr<float>());
  return {packed, absmax_u8, absmax2, offset};
}

Tensor decode_absmax(const Tensor& absmax, const Tensor& absmax2, const Tensor& code2, const Tensor& offset) {
  py::gil_scoped_release no_gil;
  const PackedWeight w(absmax, absmax, absmax2, code2, offset, 1, absmax.numel(), "nf4", 1);
  Tensor out = at::empty({absmax.numel()}, absmax.options().dtype(at::kFloat));
  cpu::decode_absmax(*w, out.data_ptr<float>());
  return out;
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& code2,
                  const OptionalTensor& offset, const std::vector<int64_t>& shape, const std::string& quant_type,
                  int64_t blocksize, at::ScalarType dtype) {
  py::gil_scoped_release no_gil;
  Tensor out = at::empty(shape, packed.options().dtype(dtype));
  const PackedWeight w(packed, absmax, absmax2, code2, offset, 1, out.numel(), quant_type, blocksize);
  cpu::dequantize(*w, dtype_of(out), out.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor> qlora_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                        const OptionalTensor& absmax2, const OptionalTensor& code2,
                                        const OptionalTensor& offset, const std::vector<int64_t>& shape,
                                        const std::string& quant_type, int64_t blocksize, const OptionalTensor& lora_A,
                                        const OptionalTensor& lora_B, double scaling, const OptionalTensor& bias,
                                        double dropout_p, const OptionalTensor& seed) {
  py::gil_scoped_release no_gil;
  const PackedWeight w(packed, absmax, absmax2, code2, offset, shape.at(0), shape.at(1), quant_type, blocksize);
  const Adapter a = adapter(lora_A, lora_B, scaling, dropout_p, seed);
  Tensor y = at::empty({x.size(0), w->N}, x.options()), h = at::empty({x.size(0), a.r}, x.options());
  cpu::qlora_linear(dtype_of(x), x.size(0), x.data_ptr(), *w, a, dense(bias), y.data_ptr(), h.data_ptr());
  return {y, h};
}

using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

Gradients qlora_linear_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h, const Tensor& packed,
                                const Tensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& code2,
                                const OptionalTensor& offset, const std::vector<int64_t>& shape, const std::string& quant_type,
                                int64_t blocksize, const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
                                double dropout_p, const OptionalTensor& seed, const std::array<bool, 4>& needs,
                                OptionalTensor dx) {
  py::gil_scoped_release no_gil;
  const PackedWeight w(packed, absmax, absmax2, code2, offset, shape.at(0), shape.at(1), quant_type, blocksize);
  const Adapter a = adapter(lora_A, lora_B, scaling, dropout_p, seed);
  const bool accumulate_dx = dx.has_value();  // float32 [M, K]
  OptionalTensor dA, dB, dbias;
  if (needs[0] && !accumulate_dx) dx = at::empty({dy.size(0), w->K}, dy.options());
  if (needs[1]) dA = at::empty_like(lora_A.value());
  if (needs[2]) dB = at::empty_like(lora_B.value());
  if (needs[3]) dbias = at::empty({w->N}, dy.options().dtype(at::kFloat));
  auto data = [](const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; };
  cpu::qlora_linear_backward(dtype_of(dy), dy.size(0), dy.data_ptr(), data(x), data(h), *w, a, accumulate_dx, data(dx),
                             data(dA), data(dB), static_cast<float*>(data(dbias)));
  return {dx, dA, dB, dbias};
}

Tensor codebook(const std::string& quant_type) {
  const float* code = quant_type_of(quant_type) == QuantType::nf4 ? NF4 : FP4;
  return at::from_blob(const_cast<float*>(code), {16}, at::kFloat).clone();
}

std::vector<std::string> cpu_levels() {
  const cpu::Kernels* levels[4];
  const int n = cpu::supported_levels(levels);
  std::vector<std::string> names;
  for (int i = 0; i < n; i++) names.emplace_back(levels[i]->name);
  return names;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  return info;
}

}  // namespace
}  // namespace lora_kernels

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace lora_kernels;
  m.def("quantize", &lora_kernels::quantize);
  m.def("decode_absmax", &lora_kernels::decode_absmax);
  m.def("dequantize", &lora_kernels::dequantize);
  m.def("qlora_linear", &lora_kernels::qlora_linear);
  m.def("qlora_linear_backward", &lora_kernels::qlora_linear_backward);
  m.def("codebook", &codebook, "float32 [16], the value of each 4-bit index");
  m.def("cpu_level", [] { return std::string(cpu::kernels().name); }, "the instruction-set level in use");
  m.def("cpu_levels", &cpu_levels, "levels this CPU supports, best first");
  m.def("build_info", &build_info);
}
