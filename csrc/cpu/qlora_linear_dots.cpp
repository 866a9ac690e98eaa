// The linear layer on a few rows of x: W is decoded in registers and never stored.
#include "convert.h"
#include "dots.h"
#include "packed_product.h"

namespace lora_kernels::cpu {

namespace {

// A few rows of x, K a multiple of 64, blocks of at least 64: W is decoded in registers, once for 4 rows of x, where packing
// would cost more than the product.  Up to MAX_DOTS rows; where a row of W is short the sum across a register at its end is
// dear, and packing wins earlier (measured at K = 576).
constexpr int64_t MAX_DOTS = 12, MAX_DOTS_SHORT = 5, SHORT = 2048, MAX_DOTS_ROWS = 512;

void store(DType dtype, void* out, int64_t i, float v) {
  if (dtype == DType::f32)
    static_cast<float*>(out)[i] = v;
  else
    static_cast<uint16_t*>(out)[i] = dtype == DType::bf16 ? BF16::store(v) : F16::store(v);
}

}  // namespace

bool takes_dots(int64_t M, const Weight& w) {
  return M <= (w.K < SHORT ? MAX_DOTS_SHORT : MAX_DOTS) && w.K % 64 == 0 && w.blocksize >= 64;
}

void qlora_linear_dots(DType dtype, int64_t M, const void* x, const Layer& layer) {
  const Weight& w = layer.weight;
  const Adapter& adapter = layer.adapter;
  const Dense bias = layer.bias;
  void *y = layer.y, *h = layer.h;
  static thread_local Scratch split_scratch, rows_scratch, dropped_scratch, h_scratch;
  const Kernels& k = kernels();
  const Product product(dtype);
  const Gemm& g = product.gemm;
  const Dropout dropout(adapter, w.K);
  const int64_t N = w.N, K = w.K, r = adapter.r, rank = ceil_div(r, GROUP) * GROUP, size = itemsize(product.type);
  const Source source{{x, dtype}, K}, dropped{{x, dtype}, K, dropout.active() ? &dropout : nullptr};
  const bool same_rows = !dropout.active() || !r, converts = !product.direct(source);
  char* split = split_scratch.get<char>(M * K * size);
  char* converted = converts ? rows_scratch.get<char>(M * K * size) : nullptr;
  char* dropped_rows = same_rows ? nullptr : dropped_scratch.get<char>(M * K * size);
  const char* rows = converts ? converted : static_cast<const char*>(x);
  const char* h_rows = same_rows ? rows : dropped_rows;
  float* h_scaled = h_scratch.get<float>(M * rank);
  std::fill_n(h_scaled, M * rank, 0.0f);
  const float h_scale = dropout.active() ? dropout.scale() : 1.0f;
  const auto dots = dtype == DType::f32 ? k.dots_f32 : dtype == DType::f16 ? k.dots_f16 : k.dots_bf16;
  int shift = 0;
  while ((int64_t{1} << shift) < w.blocksize) shift++;

  with_team(threads_for(M, w), [&](Team& team) {
    static thread_local Scratch A_scratch, B_scratch, absmax_scratch;
    if (converts || !same_rows) {
      team.share(M, [&](int64_t m) {
        if (converts) source.load_row(g, m, K, converted + m * K * size);
        if (!same_rows) dropped.load_row(g, m, K, dropped_rows + m * K * size);
      });
      team.sync();
    }
    team.share(M + ceil_div(r, RANKS), [&](int64_t i) {
      if (i < M) return g.split(rows + i * K * size, K, split + i * K * size);
      const int64_t q0 = (i - M) * RANKS, q1 = std::min(r, q0 + RANKS);
      const Source A{adapter.A, K};
      const void* a = A.at(q0, 0);
      if (!product.direct(A)) {
        char* converted_A = A_scratch.get<char>(RANKS * K * size);
        for (int64_t q = q0; q < q1; q++) A.load_row(g, q, K, converted_A + (q - q0) * K * size);
        a = converted_A;
      }
      float sums[MAX_DOTS * RANKS];
      g.rank_dots(h_rows, M, K, a, static_cast<int>(q1 - q0), sums);
      for (int64_t m = 0; m < M; m++)
        for (int64_t q = q0; q < q1; q++) {
          const float v = sums[m * RANKS + q - q0] * h_scale;
          store(dtype, h, m * r + q, v);
          h_scaled[m * rank + q] = v * adapter.scaling;
        }
    });
    team.sync();
    // Each thread reads as long a stretch of W as the balance allows, a few rows at a time whose scales stay in L1.
    const int64_t pieces = team.threads == 1 ? 1 : 4 * team.threads, piece = ceil_div(ceil_div(N, pieces), 4) * 4;
    const int64_t few = std::clamp<int64_t>(4096 * 64 / K / 4 * 4, 4, MAX_DOTS_ROWS);
    team.share(ceil_div(N, piece), [&](int64_t i) {
      float biases[MAX_DOTS_ROWS];
      float* B = B_scratch.get<float>(few * rank);
      for (int64_t n0 = i * piece, end = std::min(N, n0 + piece), n1; n0 < end; n0 = n1) {
        n1 = std::min(end, n0 + few);
        const int64_t b0 = n0 * K >> shift, b1 = ceil_div(n1 * K, w.blocksize);
        // blocks longer than a row may begin before n0: the kernel counts from row n0
        const float* absmax = w.absmax ? w.absmax + b0 : nullptr;
        if (!absmax) {
          float* decoded = absmax_scratch.get<float>(b1 - b0);
          k.decode_absmax(w.absmax_u8, w.absmax2, w.code2, w.offset, b0, b1, decoded);
          absmax = decoded;
        }
        const Source factor{adapter.B, r};
        if (r == rank) {
          if (r) k.f32.convert(adapter.B.dtype, factor.at(n0, 0), (n1 - n0) * r, B);
        } else {
          std::fill_n(B, (n1 - n0) * rank, 0.0f);
          for (int64_t n = n0; n < n1; n++) k.f32.convert(adapter.B.dtype, factor.at(n, 0), r, B + (n - n0) * rank);
        }
        if (bias.data)
          k.f32.convert(bias.dtype, static_cast<const char*>(bias.data) + n0 * itemsize(bias.dtype), n1 - n0, biases);
        dots({w.packed, w.quant_type == QuantType::nf4 ? NF4 : FP4, absmax, shift, n0 * K - (b0 << shift), K, N,
              static_cast<int>(M), split, rank, h_scaled, B, bias.data ? biases : nullptr, y, dtype},
             n0, n1);
      }
    });
  });
}

}  // namespace lora_kernels::cpu
