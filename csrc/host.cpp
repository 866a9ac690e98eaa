// Unpacks tensors, allocates outputs, and runs an op where its tensors are.
#include "host.h"

#include <c10/core/DeviceGuard.h>

#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "ops.h"
#include "panels.h"

namespace lora_kernels {
namespace {

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

Dense dense(const OptionalTensor& t) { return t ? Dense{t->data_ptr(), dtype_of(*t)} : Dense{nullptr, DType::f32}; }

// Contiguous and, for the 16-byte accesses of CUDA kernels, aligned.
Tensor aligned(const Tensor& t) {
  const Tensor c = t.contiguous();
  return c.is_cuda() && reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 ? c.clone() : c;
}

OptionalTensor aligned(const OptionalTensor& t) { return t ? OptionalTensor(aligned(*t)) : std::nullopt; }

#ifdef LORA_KERNELS_CUDA

// What an op on a CUDA device gets besides its arguments; makes that device the current one as long as it lives.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& t) : guard_(t.device()), bytes_(t.options().dtype(at::kByte)) {
    cuda::set_device(t.device().index());
    void* stream = c10::impl::VirtualGuardImpl(at::kCUDA).getStream(t.device()).native_handle();
    context_ = {stream, [this](int64_t n) { return workspace(n); }, counters(t, stream)};
  }
  CudaCall(const CudaCall&) = delete;
  const cuda::Context& operator*() const { return context_; }

 private:
  // Freed with this object: the caching allocator hands memory to later work of the same stream only.
  void* workspace(int64_t n) {
    workspaces_.push_back(at::empty({n}, bytes_));
    return workspaces_.back().data_ptr();
  }

  static int32_t* counters(const Tensor& t, void* stream) {
    static std::mutex mutex;
    static auto* of_stream = new std::map<std::pair<int, void*>, Tensor>;  // never destroyed: CUDA may be gone by then
    const std::lock_guard lock(mutex);
    Tensor& zeros = (*of_stream)[{t.device().index(), stream}];
    if (!zeros.defined()) zeros = at::zeros({cuda::COUNTERS}, t.options().dtype(at::kInt));
    return zeros.data_ptr<int32_t>();
  }

  c10::DeviceGuard guard_;
  at::TensorOptions bytes_;
  std::vector<Tensor> workspaces_;
  cuda::Context context_;
};

#endif

// Runs on_cuda(context) or on_cpu(), as the place of `t` says.
template <class Cuda, class Cpu>
void run(const Tensor& t, [[maybe_unused]] Cuda&& on_cuda, Cpu&& on_cpu) {
#ifdef LORA_KERNELS_CUDA
  if (t.is_cuda()) {
    const CudaCall call(t);
    return on_cuda(*call);
  }
#endif
  if (!t.is_cpu()) throw std::invalid_argument("the extension has no code for " + t.device().str() + " tensors");
  on_cpu();
}

// Holds the tensors of a weight while an op reads them.
class PackedWeight {
 public:
  PackedWeight(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& code2,
               const OptionalTensor& offset, int64_t N, int64_t K, const Format* format, int64_t blocksize)
      : packed_(aligned(packed)), absmax_(aligned(absmax)) {
    weight_ = {static_cast<const uint8_t*>(packed_.const_data_ptr()),
               nullptr,
               nullptr,
               nullptr,
               nullptr,
               nullptr,
               N,
               K,
               blocksize,
               format};
    if (absmax2) {
      absmax2_ = aligned(*absmax2);
      code2_ = aligned(code2.value());
      offset_ = offset.value();
      weight_.absmax_u8 = absmax_.const_data_ptr<uint8_t>();
      weight_.absmax2 = absmax2_.const_data_ptr<float>();
      weight_.code2 = code2_.const_data_ptr<float>();
      weight_.offset = offset_.const_data_ptr<float>();
    } else {
      weight_.absmax = absmax_.const_data_ptr<float>();
    }
  }
  const Weight& operator*() const { return weight_; }
  const Weight* operator->() const { return &weight_; }

 private:
  Tensor packed_, absmax_, absmax2_, code2_, offset_;
  Weight weight_;
};

// Holds the tensors of a layer while an op reads them.
struct Operands {
  explicit Operands(const Layer& l)
      : weight(l.packed, l.absmax, l.absmax2, l.code2, l.offset, l.shape[0], l.shape[1], l.quant_type, l.blocksize),
        A(aligned(l.lora_A)),
        B(aligned(l.lora_B)),
        bias(aligned(l.bias)) {
    const bool dropout = A && l.dropout_p > 0;
    const int64_t* seed = dropout ? l.seed.value().const_data_ptr<int64_t>() : nullptr;
    const int64_t r = A ? A->size(0) : 0;
    adapter = {dense(A), dense(B), r, static_cast<float>(l.scaling), dropout ? l.dropout_p : 0.0, seed};
  }

  PackedWeight weight;
  OptionalTensor A, B, bias;
  Adapter adapter;
};

int64_t rows(const Tensor& t) { return c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)); }

// [*, last] with the leading dimensions of `like`.
Tensor empty_rows(const Tensor& like, int64_t last) {
  auto sizes = like.sizes().vec();
  sizes.back() = last;
  return at::empty(sizes, like.options());
}

}  // namespace

Quantized quantize(const Tensor& weight, const std::string& quant_type, int64_t blocksize, const OptionalTensor& code2) {
  const Format& format = format_of(quant_type.c_str());
  const DType dtype = dtype_of(weight);
  const Tensor w = weight.contiguous();
  const int64_t n_blocks = (w.numel() + blocksize - 1) / blocksize;
  const auto f32 = w.options().dtype(at::kFloat), u8 = w.options().dtype(at::kByte);
  Tensor packed = at::empty({(w.numel() + 1) / 2}, u8), absmax = at::empty({n_blocks}, f32);
  const auto arguments = std::make_tuple(Dense{w.data_ptr(), dtype}, w.numel(), std::cref(format), blocksize,
                                         packed.data_ptr<uint8_t>(), absmax.data_ptr<float>());
  bool finite = true;
  run(
      w,
      [&](const auto& context) {
        const Tensor bad = at::zeros({1}, w.options().dtype(at::kInt));
        std::apply([&](const auto&... a) { cuda::quantize(context, a..., bad.data_ptr<int32_t>()); }, arguments);
        finite = bad.item<int32_t>() == 0;
      },
      [&] { finite = std::apply(cpu::quantize, arguments); });
  if (!finite) throw std::invalid_argument("weight contains NaN or infinity");
  if (!code2) return {packed, absmax, std::nullopt, std::nullopt};
  const Tensor offset = absmax.mean();  // torch's order of summation is part of the format
  Tensor absmax_u8 = at::empty({n_blocks}, u8), absmax2 = at::empty({(n_blocks + 255) / 256}, f32);
  const Tensor code = code2->to(w.device()).contiguous();
  const float *scales = absmax.const_data_ptr<float>(), *mean = offset.const_data_ptr<float>(),
              *map = code.const_data_ptr<float>();
  uint8_t* indices = absmax_u8.data_ptr<uint8_t>();
  float* scales2 = absmax2.data_ptr<float>();
  run(
      w, [&](const auto& context) { cuda::quantize_absmax(context, scales, n_blocks, mean, map, indices, scales2); },
      [&] { cpu::quantize_absmax(scales, n_blocks, *mean, map, indices, scales2); });
  return {packed, absmax_u8, absmax2, offset};
}

Tensor decode_absmax(const Tensor& absmax, const Tensor& absmax2, const Tensor& code2, const Tensor& offset) {
  const PackedWeight w(absmax, absmax, absmax2, code2, offset, 1, absmax.numel(), nullptr, 1);
  Tensor out = at::empty({absmax.numel()}, absmax.options().dtype(at::kFloat));
  float* target = out.data_ptr<float>();
  run(out, [&](const auto& context) { cuda::decode_absmax(context, *w, target); }, [&] { cpu::decode_absmax(*w, target); });
  return out;
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& code2,
                  const OptionalTensor& offset, const std::vector<int64_t>& shape, const std::string& quant_type,
                  int64_t blocksize, at::ScalarType dtype) {
  Tensor out = at::empty(shape, packed.options().dtype(dtype));
  const PackedWeight w(packed, absmax, absmax2, code2, offset, 1, out.numel(), &format_of(quant_type.c_str()), blocksize);
  const DType target = dtype_of(out);
  run(
      out, [&](const auto& context) { cuda::dequantize(context, *w, 0, w->numel(), target, out.data_ptr()); },
      [&] { cpu::dequantize(*w, target, out.data_ptr()); });
  return out;
}

Outputs qlora_linear(const Tensor& input, const std::vector<Layer>& layers) {
  const Tensor x = aligned(input);
  const DType dtype = dtype_of(x);
  const int64_t M = rows(x);
  const std::vector<Operands> operands(layers.begin(), layers.end());
  std::vector<Tensor> ys, hs;
  for (const Operands& o : operands) {
    ys.push_back(empty_rows(x, o.weight->N));
    hs.push_back(at::empty({M, o.adapter.r}, x.options()));
  }
  run(
      x,
      [&](const auto& context) {
        const bool library = panels::takes(x, M);
        for (size_t i = 0; i < layers.size(); i++) {
          const Operands& o = operands[i];
          cuda::qlora_linear(context, dtype, M, x.data_ptr(), *o.weight, o.adapter, dense(o.bias), ys[i].data_ptr(),
                             hs[i].data_ptr(), !library);
          if (library) panels::add_forward(context, *o.weight, x.view({M, o.weight->K}), ys[i].view({M, o.weight->N}));
        }
      },
      [&] {
        std::vector<cpu::Layer> list;
        for (size_t i = 0; i < layers.size(); i++) {
          const Operands& o = operands[i];
          list.push_back({*o.weight, o.adapter, dense(o.bias), ys[i].data_ptr(), hs[i].data_ptr()});
        }
        cpu::qlora_linear(dtype, M, x.data_ptr(), list);
      });
  return {ys, hs};
}

Gradients qlora_linear_backward(const std::vector<Tensor>& given_dys, const OptionalTensor& given_x,
                                const std::vector<OptionalTensor>& given_hs, const std::vector<Layer>& layers, bool need_dx,
                                const std::vector<std::array<bool, 3>>& needs) {
  const OptionalTensor x = aligned(given_x);
  const size_t n = layers.size();
  const std::vector<Operands> operands(layers.begin(), layers.end());
  std::vector<Tensor> dys;
  std::vector<OptionalTensor> hs, dAs(n), dBs(n), dbiases(n);
  for (size_t i = 0; i < n; i++) {
    const Tensor& dy = dys.emplace_back(aligned(given_dys.at(i)));
    hs.push_back(aligned(given_hs.at(i)));
    const auto [need_dA, need_dB, need_dbias] = needs.at(i);
    if (need_dA) dAs[i] = at::empty_like(operands[i].A.value());
    if (need_dB) dBs[i] = at::empty_like(operands[i].B.value());
    if (need_dbias) dbiases[i] = at::empty({operands[i].weight->N}, dy.options().dtype(at::kFloat));
  }
  auto data = [](const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; };
  auto floats = [](const OptionalTensor& t) { return t ? t->data_ptr<float>() : nullptr; };
  const Tensor& first = dys.at(0);
  const DType dtype = dtype_of(first);
  const int64_t M = rows(first), K = operands[0].weight->K;
  OptionalTensor dx;
  if (need_dx) dx = empty_rows(first, K);
  run(
      first,
      [&](const auto& context) {
        OptionalTensor sum;  // of several layers, rounded once at the end
        if (dx && n > 1) sum = at::zeros({M, K}, dx->options().dtype(at::kFloat));
        const bool library = panels::takes(first, M) && !sum;
        for (size_t i = 0; i < n; i++) {
          const Operands& o = operands[i];
          cuda::qlora_linear_backward(context, dtype, M, dys[i].data_ptr(), data(x), data(hs[i]), *o.weight, o.adapter,
                                      sum.has_value(), data(sum ? sum : dx), data(dAs[i]), data(dBs[i]), floats(dbiases[i]),
                                      !library);
          if (library && dx) panels::add_backward(context, *o.weight, dys[i].view({M, o.weight->N}), dx->view({M, K}));
        }
        if (sum) dx->copy_(sum->view(dx->sizes()));
      },
      [&] {
        std::vector<cpu::LayerGradients> list;
        for (size_t i = 0; i < n; i++) {
          const Operands& o = operands[i];
          list.push_back(
              {*o.weight, o.adapter, dys[i].data_ptr(), data(hs[i]), data(dAs[i]), data(dBs[i]), floats(dbiases[i])});
        }
        cpu::qlora_linear_backward(dtype, M, data(x), list, data(dx));
      });
  return {dx, dAs, dBs, dbiases};
}

}  // namespace lora_kernels
