// y = x W^T + s h B^T + bias with h = dropout(x) A^T, and its gradients, without ever holding all of W.
//
// W is decoded in panels of at most PANEL_BYTES into memory that is reused, and each panel is multiplied by torch's matmul.
// Products are taken in `compute`: bf16 where the CPU multiplies it natively, float32 otherwise (a CPU without the instruction
// converts inside its bf16 matmul, three times slower).  Where they are bf16, s h and B join x and W as more columns of the
// same product, and the bias as two more (its bf16 value and what that left), so that the sum is rounded once.
// The rank-r products are float32 for every dtype.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "decoder.h"

namespace lora_kernels::cpu {

namespace {

using at::Tensor;

constexpr int64_t PANEL_BYTES = 4 << 20;
constexpr int64_t ROWS = 512;  // of x and dy converted to float32 at a time

at::ScalarType scalar_type(DType t) { return t == DType::f32 ? at::kFloat : t == DType::f16 ? at::kHalf : at::kBFloat16; }

Tensor view(const void* data, at::IntArrayRef shape, DType dtype) {
  return at::from_blob(const_cast<void*>(data), shape, at::TensorOptions().dtype(scalar_type(dtype)));
}

Tensor view(Dense t, at::IntArrayRef shape) { return view(t.data, shape, t.dtype); }

DType compute_dtype(DType dtype) { return dtype == DType::bf16 && kernels().bf16_dot ? DType::bf16 : DType::f32; }

int64_t clamp(int64_t v, int64_t low, int64_t high) { return std::min(std::max(v, low), high); }

// The dropout mask of x [M, K], applied in place to `rows`, float32 rows [m0, m0 + m) of a tensor of that shape, and 1 / (1-p).
class Dropout {
 public:
  Dropout(const Adapter& adapter, int64_t K)
      : active_(adapter.dropout_p > 0),
        scale_(1.0f / static_cast<float>(1 - adapter.dropout_p)),
        threshold_(static_cast<uint64_t>(std::nearbyint(adapter.dropout_p * 4294967296.0))),
        seed_(adapter.seed),
        K_(K) {}

  void apply(Tensor& rows, int64_t m0) const {
    if (!active_) return;
    float* data = rows.data_ptr<float>();
    const auto drop = kernels().drop_f32;
    parallel(rows.size(0), ceil_div(4096, K_),
             [&](int64_t a, int64_t b) { drop(data + a * K_, seed_, threshold_, (m0 + a) * K_, (b - a) * K_, data + a * K_); });
    rows.mul_(scale_);
  }

  bool active() const { return active_; }

 private:
  bool active_;
  float scale_;
  uint64_t threshold_;
  uint64_t seed_;
  int64_t K_;
};

// Rows [m0, m0 + m) of dropout(x) as float32.
Tensor dropped(const Tensor& x, int64_t m0, int64_t m, const Dropout& dropout) {
  Tensor rows = x.narrow(0, m0, m).to(at::kFloat, false, dropout.active());
  dropout.apply(rows, m0);
  return rows;
}

// [ceil to 32 columns] of `dtype`: x, then zeros; for the columns that follow x in the product.
Tensor widened(const Tensor& x, int64_t extra) {
  Tensor out = at::empty({x.size(0), ceil_div(x.size(1) + extra, 32) * 32}, x.options());
  out.narrow(1, 0, x.size(1)).copy_(x);
  out.narrow(1, x.size(1), out.size(1) - x.size(1)).zero_();
  return out;
}

Tensor scratch_tensor(Scratch& scratch, at::IntArrayRef shape, DType dtype) {
  return view(scratch.get<char>(shape[0] * shape[1] * itemsize(dtype)), shape, dtype);
}

}  // namespace

void qlora_linear(DType dtype, int64_t M, const void* x_, const Weight& w, const Adapter& adapter, Dense bias, void* y_,
                  void* h_) {
  if (M == 0) return;
  const c10::NoGradGuard no_grad;
  static thread_local Scratch absmax_scratch, panel_scratch;
  const Decoder decoder(w, absmax_scratch);
  const int64_t N = w.N, K = w.K, r = adapter.r;
  const Tensor x = view(x_, {M, K}, dtype);
  Tensor y = view(y_, {M, N}, dtype), h, B;
  if (r) {
    const Tensor A = view(adapter.A, {r, K}).to(at::kFloat);
    B = view(adapter.B, {N, r});
    h = at::empty({M, r}, A.options());
    const Dropout dropout(adapter, K);
    for (int64_t m0 = 0; m0 < M; m0 += ROWS) {
      const int64_t m = std::min(ROWS, M - m0);
      Tensor rows = h.narrow(0, m0, m);
      at::mm_out(rows, dropped(x, m0, m, dropout), A.t());
    }
    view(h_, {M, r}, dtype).copy_(h);
    h.mul_(adapter.scaling);
  }
  const Tensor b = bias.data ? view(bias, {N}).to(at::kFloat) : Tensor();

  if (compute_dtype(dtype) == DType::bf16) {
    const int64_t extra = r + (b.defined() ? 2 : 0);
    const Tensor left = extra ? widened(x, extra) : x;
    const int64_t D = left.size(1), P = clamp(PANEL_BYTES / (2 * D), 64, N);
    if (r) left.narrow(1, K, r).copy_(h);
    if (b.defined()) left.narrow(1, K + r, 2).fill_(1);
    const Tensor panel = scratch_tensor(panel_scratch, {P, D}, dtype);
    uint16_t* data = static_cast<uint16_t*>(panel.data_ptr());
    if (D > K) panel.narrow(1, K, D - K).zero_();
    for (int64_t n0 = 0; n0 < N; n0 += P) {
      const int64_t p = std::min(P, N - n0);
      parallel(p, ceil_div(16384, K), [&](int64_t a, int64_t e) {
        for (int64_t n = a; n < e; n++) decoder.elements(dtype, false, (n0 + n) * K, (n0 + n + 1) * K, data + n * D);
      });
      if (r) panel.narrow(0, 0, p).narrow(1, K, r).copy_(B.narrow(0, n0, p));
      if (b.defined()) {
        Tensor high = panel.narrow(0, 0, p).select(1, K + r);
        high.copy_(b.narrow(0, n0, p));
        panel.narrow(0, 0, p).select(1, K + r + 1).copy_(b.narrow(0, n0, p) - high);
      }
      Tensor slice = y.narrow(1, n0, p);
      at::mm_out(slice, left, panel.narrow(0, 0, p).t());
    }
    return;
  }

  const Tensor left = x.to(at::kFloat), B32 = r ? B.to(at::kFloat) : B;
  const int64_t P = clamp(PANEL_BYTES / (4 * K), 64, N);
  const Tensor panel = scratch_tensor(panel_scratch, {P, K}, DType::f32);
  Tensor sum = at::empty({M, P}, left.options());
  for (int64_t n0 = 0; n0 < N; n0 += P) {
    const int64_t p = std::min(P, N - n0);
    parallel(p, ceil_div(16384, K), [&](int64_t a, int64_t e) {
      decoder.elements(dtype, true, (n0 + a) * K, (n0 + e) * K, panel.data_ptr<float>() + a * K);
    });
    Tensor out = p == P ? sum : at::empty({M, p}, left.options());
    at::mm_out(out, left, panel.narrow(0, 0, p).t());
    if (r) out.addmm_(h, B32.narrow(0, n0, p).t());
    if (b.defined()) out.add_(b.narrow(0, n0, p));
    y.narrow(1, n0, p).copy_(out);
  }
}

void qlora_linear_backward(DType dtype, int64_t M, const void* dy_, const void* x_, const void* h_, const Weight& w,
                           const Adapter& adapter, void* dx_, void* dA_, void* dB_, float* dbias_) {
  const c10::NoGradGuard no_grad;
  const int64_t N = w.N, K = w.K, r = adapter.r;
  const Tensor dy = view(dy_, {M, N}, dtype);
  const Dropout dropout(adapter, K);
  const auto f32 = at::TensorOptions().dtype(at::kFloat);
  const Tensor B = r ? view(adapter.B, {N, r}).to(at::kFloat) : Tensor();

  Tensor g, dA, dB, dbias;  // g is s dy B
  if (r && (dx_ || dA_)) g = at::empty({M, r}, f32);
  if (dA_) dA = at::zeros({r, K}, f32);
  if (dB_) dB = at::zeros({N, r}, f32);
  if (dbias_) dbias = at::from_blob(dbias_, {N}, f32).zero_();
  for (int64_t m0 = 0; m0 < M && (g.defined() || dB_ || dbias_); m0 += ROWS) {
    const int64_t m = std::min(ROWS, M - m0);
    const Tensor dy_rows = dy.narrow(0, m0, m).to(at::kFloat);
    if (g.defined()) {
      Tensor g_rows = g.narrow(0, m0, m);
      at::mm_out(g_rows, dy_rows, B);
      g_rows.mul_(adapter.scaling);
    }
    if (dA_) dA.addmm_(g.narrow(0, m0, m).t(), dropped(view(x_, {M, K}, dtype), m0, m, dropout));
    if (dB_) dB.addmm_(dy_rows.t(), view(h_, {M, r}, dtype).narrow(0, m0, m).to(at::kFloat), 1, adapter.scaling);
    if (dbias_) dbias.add_(dy_rows.sum(0));
  }
  if (dA_) view(dA_, {r, K}, adapter.A.dtype).copy_(dA);
  if (dB_) view(dB_, {N, r}, adapter.B.dtype).copy_(dB);
  if (!dx_ || M == 0) return;

  static thread_local Scratch absmax_scratch, panel_scratch;
  const Decoder decoder(w, absmax_scratch);
  Tensor dx = view(dx_, {M, K}, dtype);
  const DType compute = compute_dtype(dtype);
  const bool bf16 = compute == DType::bf16, extra_rows = bf16 && r && !dropout.active();
  const Tensor A = r ? view(adapter.A, {r, K}).to(at::kFloat) : Tensor();
  Tensor masked;  // dropout(s g A), which the mask keeps out of the product
  if (r && dropout.active()) {
    masked = at::mm(g, A);
    dropout.apply(masked, 0);
  }
  const Tensor left = extra_rows ? widened(dy, r) : bf16 ? dy : dy.to(at::kFloat);
  if (extra_rows) left.narrow(1, N, r).copy_(g);
  // Strips of columns of W, so that a sum over N is never cut in two and rounded between.
  const int64_t D = left.size(1), size = itemsize(compute);
  const int64_t P = std::min(K, std::max<int64_t>(64, PANEL_BYTES / (size * D) / 64 * 64));
  char* data = panel_scratch.get<char>(D * P * size);
  for (int64_t k0 = 0; k0 < K; k0 += P) {
    const int64_t p = std::min(P, K - k0);
    const Tensor panel = view(data, {D, p}, compute);
    parallel(N, ceil_div(16384, p), [&](int64_t a, int64_t e) {
      for (int64_t n = a; n < e; n++) decoder.elements(dtype, !bf16, n * K + k0, n * K + k0 + p, data + n * p * size);
    });
    if (extra_rows) {
      panel.narrow(0, N, r).copy_(A.narrow(1, k0, p));
      panel.narrow(0, N + r, D - N - r).zero_();
    }
    Tensor slice = dx.narrow(1, k0, p);
    if (bf16 && !masked.defined()) {
      at::mm_out(slice, left, panel);
      continue;
    }
    Tensor sum = at::mm(left, panel).to(at::kFloat);
    if (masked.defined())
      sum.add_(masked.narrow(1, k0, p));
    else if (r)
      sum.addmm_(g, A.narrow(1, k0, p));
    slice.copy_(sum);
  }
}

}  // namespace lora_kernels::cpu
