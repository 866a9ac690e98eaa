// The linear layer on a few rows of x.  The time is that of reading W, so each thread reads one long stretch of it, once.
#include "few_rows.h"

#include "convert.h"
#include "packed.h"

namespace lora_kernels::cpu {

namespace {

constexpr int64_t SHORT_CALL = 2 << 20;                        // weights
constexpr int64_t CHUNK_VALUES = 4096 * 64, CHUNK_ROWS = 128;  // of W, whose scales and rows of B are decoded together

void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

void store(DType dtype, void* out, int64_t i, float v) {
  if (dtype == DType::f32)
    static_cast<float*>(out)[i] = v;
  else
    static_cast<uint16_t*>(out)[i] = dtype == DType::bf16 ? BF16::store(v) : F16::store(v);
}

// One of the layers.
class Part {
 public:
  Part(const Layer& layer, DType dtype, int64_t M, const Product& product)
      : layer_(layer),
        w_(layer.weight),
        dtype_(dtype),
        M_(static_cast<int>(M)),
        rank_(ceil_div(layer.adapter.r, GROUP) * GROUP),
        chunk_(std::clamp<int64_t>(CHUNK_VALUES / w_.K / 8 * 8, 8, CHUNK_ROWS)),
        product_(product),
        dropout_(layer.adapter, w_.K),
        shift_(w_.shift()) {
    const Kernels& k = kernels();
    dots_ = dtype == DType::f32 ? k.dots_f32 : dtype == DType::f16 ? k.dots_f16 : k.dots_bf16;
  }

  int64_t rows() const { return w_.N; }
  int64_t h_size() const { return M_ * rank_; }
  int64_t rank_units() const { return ceil_div(layer_.adapter.r, RANKS); }
  const Dropout* dropout() const { return layer_.adapter.r && dropout_.active() ? &dropout_ : nullptr; }

  // Rows [unit * RANKS, ...) of h, and scaled in `h`; x of the type that is multiplied, dropped.
  void rank_rows(const char* x, int64_t unit, float* h) const {
    const Adapter& adapter = layer_.adapter;
    const int64_t q0 = unit * RANKS, q1 = std::min(adapter.r, q0 + RANKS), end = q1 == adapter.r ? rank_ : q1;
    const float scale = dropout_.active() ? dropout_.scale() : 1.0f;
    float sums[MAX_DOTS * RANKS];
    product_.gemm.rank_dots(x, M_, w_.K, adapter.A.dtype, Source{adapter.A, w_.K}.at(q0, 0), static_cast<int>(q1 - q0), sums);
    for (int64_t m = 0; m < M_; m++) {
      for (int64_t q = q0; q < q1; q++) {
        const float v = sums[m * RANKS + q - q0] * scale;
        store(dtype_, layer_.h, m * adapter.r + q, v);
        h[m * rank_ + q] = v * adapter.scaling;
      }
      for (int64_t q = q1; q < end; q++) h[m * rank_ + q] = 0;
    }
  }

  // Rows [n0, end) of the output; x split, h scaled.
  void output_rows(const char* x, const float* h, int64_t n0, int64_t end, Scratch& absmax_scratch, Scratch& B_scratch) const {
    const Kernels& k = kernels();
    float biases[CHUNK_ROWS];
    const int64_t K = w_.K, r = layer_.adapter.r;
    const Source factor{layer_.adapter.B, r};
    for (int64_t n1; n0 < end; n0 = n1) {
      n1 = std::min(end, n0 + chunk_);
      const float* absmax = scales(n0, n1, absmax_scratch);
      const float* B = static_cast<const float*>(factor.at(n0, 0));
      if (factor.data.dtype != DType::f32 || r != rank_) {
        float* padded = B_scratch.get<float>(chunk_ * rank_);
        if (r != rank_) std::fill_n(padded, (n1 - n0) * rank_, 0.0f);
        for (int64_t n = n0; n < n1; n++) k.f32.convert(factor.data.dtype, factor.at(n, 0), r, padded + (n - n0) * rank_);
        B = padded;
      }
      const Dense& bias = layer_.bias;
      if (bias.data)
        k.f32.convert(bias.dtype, static_cast<const char*>(bias.data) + n0 * itemsize(bias.dtype), n1 - n0, biases);
      fetch_factors(n1, std::min(end, n1 + chunk_));
      dots_({w_.packed, w_.packed + ceil_div(w_.numel(), 2), w_.format->code, absmax, K, w_.N, M_, x, rank_, h, B,
             bias.data ? biases : nullptr, layer_.y, dtype_},
            n0, n1);
    }
  }

 private:
  // Of every 64 weights of rows [n0, n1).
  const float* scales(int64_t n0, int64_t n1, Scratch& scratch) const {
    const int64_t b0 = n0 * w_.K >> shift_, b1 = ceil_div(n1 * w_.K, w_.blocksize);
    if (w_.absmax && shift_ == 6) return w_.absmax + b0;
    const int64_t first = n0 * w_.K / 64, count = (n1 - n0) * w_.K / 64;
    float* out = scratch.get<float>(count);
    if (!w_.absmax) kernels().decode_absmax(w_.absmax_u8, w_.absmax2, w_.code2, *w_.offset, b0, b1, out);
    if (shift_ == 6) return out;
    const float* blocks = w_.absmax ? w_.absmax + b0 : out;
    for (int64_t i = count - 1; i >= 0; i--) out[i] = blocks[((first + i) >> (shift_ - 6)) - b0];  // backwards: in place
    return out;
  }

  // The scales and the rows of B that belong to rows [n0, n1).
  void fetch_factors(int64_t n0, int64_t n1) const {
    if (n0 >= n1) return;
    const int64_t b0 = n0 * w_.K >> shift_, b1 = ceil_div(n1 * w_.K, w_.blocksize);
    w_.absmax ? fetch(w_.absmax + b0, (b1 - b0) * 4) : fetch(w_.absmax_u8 + b0, b1 - b0);
    const int64_t r = layer_.adapter.r;
    if (r) fetch(Source{layer_.adapter.B, r}.at(n0, 0), (n1 - n0) * r * itemsize(layer_.adapter.B.dtype));
  }

  const Layer& layer_;
  const Weight& w_;
  const DType dtype_;
  const int M_;
  const int64_t rank_, chunk_;
  const Product& product_;
  const Dropout dropout_;
  const int shift_;
  void (*dots_)(const Dots&, int64_t, int64_t);
};

}  // namespace

bool takes_few_rows(DType dtype, int64_t M, const Weight& w) {
  return M <= Product(dtype).gemm.few && w.K % 64 == 0 && w.blocksize >= 64;
}

void qlora_linear_few_rows(DType dtype, int64_t M, const void* x, const std::vector<Layer>& layers) {
  static thread_local Scratch split_scratch, rows_scratch, dropped_scratch, h_scratch;
  const Product product(dtype);
  const Gemm& g = product.gemm;
  const int64_t K = layers.at(0).weight.K, row_bytes = K * itemsize(product.type);
  std::vector<Part> parts;
  parts.reserve(layers.size());
  int64_t rows = 0, h_size = 0, rank_units = 0, dropouts = 0;
  for (const Layer& layer : layers) {
    const Part& part = parts.emplace_back(layer, dtype, M, product);
    rows += part.rows(), h_size += part.h_size(), rank_units += part.rank_units(), dropouts += part.dropout() != nullptr;
  }
  const Source source{{x, dtype}, K};
  const bool converts = !product.direct(source);
  const int64_t step_bytes = g.step * itemsize(product.type);
  char* split = split_scratch.get<char>(ceil_div(K, g.step) * M * step_bytes);
  char* converted = converts ? rows_scratch.get<char>(M * row_bytes) : nullptr;
  char* dropped = dropouts ? dropped_scratch.get<char>(dropouts * M * row_bytes) : nullptr;
  const char* x_rows = converts ? converted : static_cast<const char*>(x);
  float* h = h_scratch.get<float>(h_size);

  with_team(threads_for(M, rows * K), [&](Team& team) {
    static thread_local Scratch B_scratch, absmax_scratch;
    // f(part, rows of x for its adapter, its h)
    auto each_part = [&](const auto& f) {
      const char* next_dropped = dropped;
      float* next_h = h;
      for (const Part& part : parts) {
        f(part, part.dropout() ? next_dropped : x_rows, next_h);
        if (part.dropout()) next_dropped += M * row_bytes;
        next_h += part.h_size();
      }
    };
    if (converts || dropouts) {
      team.share(M, [&](int64_t m) {
        if (converts) source.load_row(g, m, K, converted + m * row_bytes);
        each_part([&](const Part& part, const char* to, float*) {
          if (part.dropout()) Source{{x, dtype}, K, part.dropout()}.load_row(g, m, K, const_cast<char*>(to) + m * row_bytes);
        });
      });
      team.sync();
    }
    // All rows of all layers are one line that is cut in pieces: one a thread where the call is too short for more.
    const int64_t pieces = rows * K < SHORT_CALL ? team.threads : 4 * team.threads;
    const int64_t piece = ceil_div(ceil_div(rows, pieces), 8) * 8;
    team.share(rank_units + M, [&](int64_t i) {
      if (i >= rank_units)
        return g.split(x_rows + (i - rank_units) * row_bytes, K, split + (i - rank_units) * step_bytes, M * g.step);
      each_part([&](const Part& part, const char* rows, float* h) {
        if (0 <= i && i < part.rank_units()) part.rank_rows(rows, i, h);
        i -= part.rank_units();
      });
    });
    team.sync();
    team.share(ceil_div(rows, piece), [&](int64_t i) {
      int64_t begin = 0;
      each_part([&](const Part& part, const char*, const float* h) {
        const int64_t n0 = std::max(i * piece - begin, int64_t{0}), n1 = std::min((i + 1) * piece - begin, part.rows());
        if (n0 < n1) part.output_rows(split, h, n0, n1, absmax_scratch, B_scratch);
        begin += part.rows();
      });
    });
  });
}

}  // namespace lora_kernels::cpu
