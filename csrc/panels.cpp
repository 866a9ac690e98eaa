#ifdef LORA_KERNELS_CUDA
#include "panels.h"

#include <c10/core/GradMode.h>

#include <algorithm>

namespace lora_kernels::panels {
namespace {

using at::Tensor;

// A tile of csrc/cuda at half the speed of the library breaks even near these rows, and the largest panel is that of a small
// part of any GPU's memory.  Reckoned, not measured.
constexpr int64_t LIBRARY_ROWS = 256, PANEL_BYTES = 64 << 20;

// f(begin, end, rows [begin, end) of W) for all of it, decoded to the dtype and device of `like`.
template <class F>
void each_panel(const cuda::Context& context, const Weight& W, const Tensor& like, const F& f) {
  const c10::NoGradGuard no_grad;
  const DType dtype = like.scalar_type() == at::kHalf ? DType::f16 : DType::bf16;
  const int64_t fitting = PANEL_BYTES / (W.K * like.element_size());
  const int64_t rows = std::max<int64_t>(32, fitting / 32 * 32);  // cuda::dequantize begins at multiples of 32 elements
  const Tensor panel = at::empty({std::min(rows, W.N), W.K}, like.options());
  for (int64_t begin = 0; begin < W.N; begin += rows) {
    const int64_t end = std::min(W.N, begin + rows);
    cuda::dequantize(context, W, begin * W.K, end * W.K, dtype, panel.data_ptr());
    f(begin, end, panel.narrow(0, 0, end - begin));
  }
}

}  // namespace

bool takes(const Tensor& x, int64_t M) { return x.element_size() == 2 && M > LIBRARY_ROWS; }

void add_forward(const cuda::Context& context, const Weight& W, const Tensor& x, const Tensor& y) {
  each_panel(context, W, x,
             [&](int64_t begin, int64_t end, const Tensor& part) { y.slice(1, begin, end).addmm_(x, part.t()); });
}

void add_backward(const cuda::Context& context, const Weight& W, const Tensor& dy, const Tensor& dx) {
  each_panel(context, W, dy, [&](int64_t begin, int64_t end, const Tensor& part) { dx.addmm_(dy.slice(1, begin, end), part); });
}

}  // namespace lora_kernels::panels
#endif
