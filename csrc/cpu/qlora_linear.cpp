// y = x W^T + s h B^T + bias with h = dropout(x) A^T, and its gradients, without ever holding more of W than a panel.
#include "convert.h"
#include "dots.h"
#include "packed_product.h"

namespace lora_kernels::cpu {

namespace {

// Rows a block of packed left operands holds.
int64_t rows_per_block(int64_t M, int64_t depth) {
  const int64_t blocks = std::max<int64_t>(1, (M * depth * 4 + LEFT_BYTES / 2) / LEFT_BYTES);
  return std::max<int64_t>(1, ceil_div(M, blocks));
}

// What the calling thread keeps for its next call, in whichever direction.
struct Kept {
  Scratch absmax, left, right, tail, g, packed_g, packed_h;
};

Kept& kept() {
  static thread_local Kept memory;
  return memory;
}

constexpr int64_t ABSMAX_UNIT = 64 * 256;

// Units of work that decode the scales of a double-quantized weight into `out`.
int64_t absmax_units(const Weight& w) { return w.absmax ? 0 : ceil_div(w.n_blocks(), ABSMAX_UNIT); }

void decode_absmax_unit(const Weight& w, int64_t unit, float* out) {
  const int64_t begin = unit * ABSMAX_UNIT, end = std::min(w.n_blocks(), begin + ABSMAX_UNIT);
  kernels().decode_absmax(w.absmax_u8, w.absmax2, w.code2, w.offset, begin, end, out + begin);
}

// a^T b of a [M, rows] and b [M, columns] -> out [rows, columns], or transposed [columns, rows]: the gradient of an adapter.
// `sums` [columns] gets b summed over M.  Rows of a are packed once, b a strip of columns and a block of rows at a time; each
// strip is one thread's and M is taken in order, so there are no partial results to add.
class Outer {
 public:
  static constexpr int64_t STRIP = 2 * COLUMNS;
  static constexpr int64_t BLOCK = 64;  // rows of b packed at a time: a strip of them fits in L1

  Outer(const Product& product, Source a, int64_t rows, Source b, int64_t columns, int64_t M, float scale, Dense out,
        bool transposed, float* sums)
      : product_(product),
        a_(a),
        b_(b),
        rows_(rows),
        columns_(columns),
        M_(M),
        scale_(scale),
        out_(out),
        transposed_(transposed),
        sums_(sums),
        tiles_(rows + (sums ? 1 : 0)) {}

  int64_t strips() const { return ceil_div(columns_, STRIP); }
  int64_t packed_dwords() const { return product_.steps(M_) * width(); }

  // All of a -> [steps of M][width]; with sums, a last row of ones.
  void pack(uint32_t* packed) const {
    for (int64_t q = 0; q < rows_; q += GROUP)
      product_.interleave(a_, 0, M_, q, static_cast<int>(std::min<int64_t>(GROUP, rows_ - q)), packed + q, width(), GROUP);
    if (sums_)
      for (int64_t s = 0; s < product_.steps(M_); s++) packed[s * width() + rows_] = ones(s);
  }

  void strip(const uint32_t* packed, int64_t unit, Scratch& panel_scratch, Scratch& sum_scratch) const {
    const Gemm& g = product_.gemm;
    uint32_t* data = panel_scratch.get<uint32_t>(product_.steps(BLOCK) * COLUMNS);
    float* sums = sum_scratch.get<float>((tiles_.M + rows_) * STRIP);
    float* turned = sums + tiles_.M * STRIP;
    const int64_t begin = unit * STRIP, end = std::min(columns_, begin + STRIP);
    if (!M_) std::fill_n(sums, tiles_.M * STRIP, 0.0f);
    for (int64_t m = 0; m < M_; m += BLOCK) {
      const int64_t n = std::min(BLOCK, M_ - m);
      const Panel panel{data, product_.steps(n), g.width};
      for (int64_t c = begin; c < end; c += COLUMNS) {
        const int columns = static_cast<int>(std::min<int64_t>(COLUMNS, end - c));
        product_.interleave(b_, m, n, c, columns, data, g.width, panel.group_stride());
        for (int64_t i = 0; i < tiles_.count; i++) {
          const Strided left{packed + product_.steps(m) * width() + tiles_.begin(i), 1, width()};
          // the next block, a part at a time: rows are too far apart for the hardware to see what comes
          for (int64_t j = m + n + BLOCK * i / tiles_.count; j < std::min(M_, m + n + BLOCK * (i + 1) / tiles_.count); j++)
            for (int q = 0; q < columns; q += 64 / itemsize(b_.data.dtype)) __builtin_prefetch(b_.at(j, c + q));
          float* tile = sums + ((c - begin) * tiles_.M + tiles_.begin(i) * COLUMNS);
          for (int p = 0; p < columns; p += g.width)
            g.tile(tiles_.rows(i), left, panel.steps, {}, 0, panel.at(p / GROUP, 0),
                   {tile + p, m > 0, true, nullptr, nullptr, nullptr, 0, DType::f32, std::min(g.width, columns - p), false});
        }
      }
    }
    for (int64_t c = begin; c < end; c += COLUMNS) {
      const int64_t n = std::min<int64_t>(COLUMNS, end - c);
      const float* piece = sums + (c - begin) * tiles_.M;
      if (sums_) std::copy_n(piece + rows_ * COLUMNS, n, sums_ + c);
      if (!out_.data) continue;
      if (!transposed_) {
        for (int64_t q = 0; q < rows_; q++) g.store(piece + q * COLUMNS, n, scale_, out_.dtype, out(q * columns_ + c));
        continue;
      }
      for (int64_t q = 0; q < rows_; q += GROUP)
        kernels().f32.transpose(piece + q * COLUMNS, COLUMNS, static_cast<int>(std::min<int64_t>(GROUP, rows_ - q)), n,
                                reinterpret_cast<uint32_t*>(turned) + q, rows_);
      g.store(turned, n * rows_, scale_, out_.dtype, out(c * rows_));
    }
  }

 private:
  int64_t width() const { return ceil_div(tiles_.M, GROUP) * GROUP; }
  void* out(int64_t i) const { return static_cast<char*>(const_cast<void*>(out_.data)) + i * itemsize(out_.dtype); }
  uint32_t ones(int64_t step) const {
    if (product_.type == DType::f32) return 0x3f800000;
    return 2 * step + 1 < M_ ? 0x3f803f80 : 0x3f80;
  }

  const Product& product_;
  Source a_, b_;
  int64_t rows_, columns_, M_;
  float scale_;
  Dense out_;
  bool transposed_;
  float* sums_;
  Tiles tiles_;
};

void packed_linear(DType dtype, int64_t M, const void* x, const Layer& layer) {
  const Weight& w = layer.weight;
  const Adapter& adapter = layer.adapter;
  const Dense bias = layer.bias;
  void *y = layer.y, *h = layer.h;
  Kept& memory = kept();
  const int64_t N = w.N, K = w.K, r = adapter.r;
  const Product product(dtype);
  const Dropout dropout(adapter, K);
  const Source A{adapter.A, K}, B{adapter.B, r};
  const int64_t steps = product.steps(K), groups = ceil_div(r, GROUP);

  float* absmax = w.absmax ? nullptr : memory.absmax.get<float>(w.n_blocks());
  uint32_t* right = memory.right.get<uint32_t>(groups * GROUP * steps);
  const float h_scale = dropout.active() ? dropout.scale() : 1.0f;
  uint32_t* tail = memory.tail.get<uint32_t>(M * product.steps(r));
  if (r % product.gemm.values) std::fill_n(tail, M * product.steps(r), 0u);
  const Left left{product, {{x, dtype}, K},           K,   r, right, dropout.active() ? &dropout : nullptr, {h, dtype},
                  h_scale, h_scale * adapter.scaling, tail};
  const int64_t block = rows_per_block(M, steps);
  uint32_t* packed = memory.left.get<uint32_t>(left.packs() ? block * steps : 0);
  const WeightPanels weight(w, absmax ? absmax : w.absmax, product, dtype);

  with_team(threads_for(M, w.numel()), [&](Team& team) {
    static thread_local Scratch tile_scratch;
    constexpr int64_t UNIT = 4 * CHUNK;  // of K, of 16 rows of A
    const int64_t decode_units = absmax_units(w), a_units = ceil_div(K, UNIT);
    team.share(decode_units + groups * a_units, [&](int64_t unit) {
      if (unit < decode_units) return decode_absmax_unit(w, unit, absmax);
      const int64_t q = (unit - decode_units) / a_units * GROUP, k0 = (unit - decode_units) % a_units * UNIT;
      const int64_t n = std::min(UNIT, K - k0);
      uint32_t* to = right + q * steps + product.steps(k0) * GROUP;
      if (r - q < GROUP) std::fill_n(to, product.steps(n) * GROUP, 0u);
      product.transpose(A, q, static_cast<int>(std::min<int64_t>(GROUP, r - q)), k0, n, to, GROUP);
    });
    team.sync();
    for (int64_t m0 = 0; m0 < M; m0 += block) {
      const Tiles tiles(std::min(block, M - m0));
      if (left.packs() || left.r) {
        team.share(tiles.count, [&](int64_t i) { left.prepare(m0, tiles, i, packed, tile_scratch); });
        team.sync();
      }
      multiply(
          team, left, packed, m0, tiles, {N, bias.data ? &bias : nullptr, nullptr},
          [&](int64_t n, int64_t k0, int64_t k1, const Panel& panel) { weight.transposed(n, k0, k1, panel); },
          [&](int64_t n, const Panel& panel, int64_t step) {
            for (int group = 0; group < COLUMNS / GROUP; group++) {
              const int64_t row = n + group * GROUP;
              const int rows = static_cast<int>(std::clamp<int64_t>(N - row, 0, GROUP));
              if (rows) product.transpose(B, row, rows, 0, r, panel.at(group, step), panel.width);
            }
          },
          y, dtype, false);
      team.sync();
    }
  });
}

void packed_backward(DType dtype, int64_t M, const void* x, const LayerGradients& layer, bool accumulate_dx, void* dx) {
  const Weight& w = layer.weight;
  const Adapter& adapter = layer.adapter;
  const void *dy = layer.dy, *h = layer.h;
  void *dA = layer.dA, *dB = layer.dB;
  float* dbias = layer.dbias;
  Kept& memory = kept();
  const int64_t N = w.N, K = w.K, r = adapter.r;
  const Product product(dtype);
  const Dropout dropout(adapter, K);
  const Source A{adapter.A, K}, B{adapter.B, r}, source_dy{{dy, dtype}, N};
  const int64_t steps = product.steps(N), groups = ceil_div(r, GROUP);
  const bool need_g = r && (dx || dA);
  const float dropped_scale = adapter.scaling * (dropout.active() ? dropout.scale() : 1.0f);

  float* absmax = dx && !w.absmax ? memory.absmax.get<float>(w.n_blocks()) : nullptr;
  uint32_t* right = need_g ? memory.right.get<uint32_t>(groups * GROUP * steps) : nullptr;
  void* g = need_g ? memory.g.get<char>(M * r * itemsize(product.type)) : nullptr;
  uint32_t* tail = need_g ? memory.tail.get<uint32_t>(M * product.steps(r)) : nullptr;
  if (need_g && r % product.gemm.values) std::fill_n(tail, M * product.steps(r), 0u);
  const Left left{product, source_dy, N, need_g ? r : 0, right, nullptr, {g, product.type}, 1.0f, dropped_scale, tail};
  const int64_t block = rows_per_block(M, steps);
  uint32_t* packed = (dx || need_g) && left.packs() ? memory.left.get<uint32_t>(block * steps) : nullptr;
  const WeightPanels weight(w, absmax ? absmax : w.absmax, product, dtype);

  const Outer outer_A(product, {{g, product.type}, r}, r, {{x, dtype}, K, dropout.active() ? &dropout : nullptr}, K, M,
                      dropped_scale, {dA, adapter.A.dtype}, false, nullptr);
  const Outer outer_B(product, {{h, dtype}, r}, dB ? r : 0, source_dy, N, M, adapter.scaling, {dB, adapter.B.dtype}, true,
                      dbias);
  const bool need_B = dB || dbias;
  uint32_t* packed_g = dA ? memory.packed_g.get<uint32_t>(outer_A.packed_dwords()) : nullptr;
  uint32_t* packed_h = need_B ? memory.packed_h.get<uint32_t>(outer_B.packed_dwords()) : nullptr;

  with_team(threads_for(M, w.numel()), [&](Team& team) {
    static thread_local Scratch tile_scratch, strip_scratch, sum_scratch;
    constexpr int64_t UNIT = 1024;  // of N, of 16 columns of B
    const int64_t decode_units = dx && M ? absmax_units(w) : 0, b_units = ceil_div(N, UNIT);
    team.share(decode_units + (need_g && M ? groups * b_units : 0), [&](int64_t unit) {
      if (unit < decode_units) return decode_absmax_unit(w, unit, absmax);
      const int64_t q = (unit - decode_units) / b_units * GROUP, n0 = (unit - decode_units) % b_units * UNIT;
      product.interleave(B, n0, std::min(UNIT, N - n0), q, static_cast<int>(std::min<int64_t>(GROUP, r - q)),
                         right + q * steps + product.steps(n0) * GROUP, GROUP, GROUP);
    });
    team.sync();
    for (int64_t m0 = 0; m0 < M && (dx || need_g); m0 += block) {
      const Tiles tiles(std::min(block, M - m0));
      if (left.packs() || left.r) {
        team.share(tiles.count, [&](int64_t i) { left.prepare(m0, tiles, i, packed, tile_scratch); });
        team.sync();
      }
      if (!dx) continue;
      multiply(
          team, left, packed, m0, tiles, {K, nullptr, r && dropout.active() ? &dropout : nullptr},
          [&](int64_t k, int64_t n0, int64_t n1, const Panel& panel) { weight.straight(k, n0, n1, panel); },
          [&](int64_t k, const Panel& panel, int64_t step) {
            product.interleave(A, 0, r, k, static_cast<int>(std::min<int64_t>(COLUMNS, K - k)), panel.at(0, step), panel.width,
                               panel.group_stride());
          },
          dx, accumulate_dx ? DType::f32 : dtype, accumulate_dx);
      team.sync();
    }
    team.share(2, [&](int64_t i) {
      if (i == 0 && dA) outer_A.pack(packed_g);
      if (i == 1 && need_B) outer_B.pack(packed_h);
    });
    team.sync();
    const int64_t strips_A = dA ? outer_A.strips() : 0, strips_B = need_B ? outer_B.strips() : 0;
    team.share(strips_A + strips_B, [&](int64_t i) {
      if (i < strips_A)
        outer_A.strip(packed_g, i, strip_scratch, sum_scratch);
      else
        outer_B.strip(packed_h, i - strips_A, strip_scratch, sum_scratch);
    });
  });
}

}  // namespace

void qlora_linear(DType dtype, int64_t M, const void* x, const std::vector<Layer>& layers) {
  if (M == 0) return;
  if (std::all_of(layers.begin(), layers.end(), [&](const Layer& layer) { return takes_dots(M, layer.weight); }))
    return qlora_linear_dots(dtype, M, x, layers);
  for (const Layer& layer : layers) packed_linear(dtype, M, x, layer);
}

void qlora_linear_backward(DType dtype, int64_t M, const void* x, const std::vector<LayerGradients>& layers, void* dx) {
  if (layers.size() == 1 || !dx) {
    for (const LayerGradients& layer : layers) packed_backward(dtype, M, x, layer, false, dx);
    return;
  }
  const int64_t K = layers.at(0).weight.K;
  std::vector<float> sum(M * K);
  for (const LayerGradients& layer : layers) packed_backward(dtype, M, x, layer, true, sum.data());
  kernels().f32.store(sum.data(), M * K, 1.0f, dtype, dx);
}

}  // namespace lora_kernels::cpu
