// y = x W^T + s h B^T + bias with h = dropout(x) A^T, and its gradients, without ever holding more of W than a panel.
#include <deque>

#include "few_rows.h"
#include "packed.h"

namespace lora_kernels::cpu {

namespace {

// Rows of a block of left operands of `steps` altogether.
int64_t rows_per_block(const Gemm& gemm, int64_t M, int64_t steps) {
  const int64_t blocks = std::max<int64_t>(1, (M * steps * 4 + LEFT_BYTES / 2) / LEFT_BYTES);
  return std::max<int64_t>(1, ceil_div(ceil_div(M, blocks), gemm.grain) * gemm.grain);
}

// What the calling thread keeps for its next call, in whichever direction.
struct Kept {
  struct OfLayer {
    Scratch absmax, right, tail, g, packed_g, packed_h;
  };
  Scratch left, packed_gs;
  std::deque<OfLayer> layers;

  OfLayer& layer(size_t i) {
    while (layers.size() <= i) layers.emplace_back();
    return layers[i];
  }
};

Kept& kept() {
  static thread_local Kept memory;
  return memory;
}

// f(item, unit) for units [0, count(item)) of every item, as Team::share.
template <class Items, class Count, class F>
void share_units(Team& team, const Items& items, const Count& count, const F& f) {
  int64_t total = 0;
  for (const auto& item : items) total += count(item);
  team.share(total, [&](int64_t unit) {
    auto item = items.begin();
    for (int64_t n; unit >= (n = count(*item)); ++item) unit -= n;
    f(*item, unit);
  });
}

// A layer in a packed product: of forward (`transposed`), [W | B]^T with A^T for h, or of dx, [W ; A] with B for g.
struct LayerOperand {
  static constexpr int64_t ABSMAX_UNIT = 64 * 256, FACTOR_UNIT = 4 * CHUNK;

  const Product& product;
  const Weight& w;
  const bool transposed;
  const int64_t D, r;     // r 0: without the adapter
  const Source factor;    // of h or g
  float* const absmax;    // of the whole weight, decoded; null where that is not needed
  uint32_t* const right;  // `factor`, packed: [ceil(r / 16)][steps of D][16]
  const Dropout dropout;
  const WeightPanels weight;
  const FactorPanels tail;

  LayerOperand(const Product& product, DType dtype, const Weight& w, const Adapter& adapter, bool transposed, int64_t r,
               bool reads_weight, Kept::OfLayer& memory)
      : product(product),
        w(w),
        transposed(transposed),
        D(transposed ? w.K : w.N),
        r(r),
        factor(transposed ? Source{adapter.A, w.K} : Source{adapter.B, r}),
        absmax(reads_weight && !w.absmax ? memory.absmax.get<float>(w.n_blocks()) : nullptr),
        right(memory.right.get<uint32_t>(ceil_div(r, GROUP) * GROUP * product.steps(D))),
        dropout(adapter, w.K),
        weight(w, absmax ? absmax : w.absmax, product, dtype, transposed),
        tail(transposed ? Source{adapter.B, r} : Source{adapter.A, w.K}, transposed ? w.N : w.K, product, transposed) {}

  int64_t absmax_units() const { return absmax ? ceil_div(w.n_blocks(), ABSMAX_UNIT) : 0; }
  int64_t factor_units() const { return ceil_div(D, FACTOR_UNIT); }
  int64_t units() const { return absmax_units() + ceil_div(r, GROUP) * factor_units(); }

  // One of the units of `absmax` and `right`.
  void prepare(int64_t unit) const {
    if (unit < absmax_units()) {
      const int64_t begin = unit * ABSMAX_UNIT, end = std::min(w.n_blocks(), begin + ABSMAX_UNIT);
      return kernels().decode_absmax(w.absmax_u8, w.absmax2, w.code2, *w.offset, begin, end, absmax + begin);
    }
    unit -= absmax_units();
    const int64_t q = unit / factor_units() * GROUP, d0 = unit % factor_units() * FACTOR_UNIT;
    const int64_t n = std::min(FACTOR_UNIT, D - d0);
    uint32_t* to = right + q * product.steps(D) + product.steps(d0) * GROUP;
    if (r - q < GROUP) std::fill_n(to, product.steps(n) * GROUP, 0u);
    product.pack_right(factor, transposed, d0, n, q, static_cast<int>(std::min<int64_t>(GROUP, r - q)), to, GROUP, GROUP);
  }
};

// a^T b of a [M, rows] and b [M, columns] -> out [rows, columns], or transposed [columns, rows]: the gradient of an adapter, or
// of several that share b.  `sums` [columns] gets b summed over M.  Rows of a are packed once, b a strip of columns and a block
// of rows at a time; each strip is one thread's and M is taken in order, so there are no partial results to add.
class Outer {
 public:
  static constexpr int64_t STRIP = 2 * COLUMNS;
  static constexpr int64_t BLOCK = 64;  // rows of b packed at a time: a strip of them fits in L1

  struct Factor {
    Source a;
    int64_t rows;
    float scale;
    Dense out;
  };

  Outer(const Product& product, std::vector<Factor> factors, Source b, int64_t columns, int64_t M, bool transposed, float* sums,
        Scratch& packed)
      : product_(product),
        factors_(std::move(factors)),
        b_(b),
        columns_(columns),
        M_(M),
        transposed_(transposed),
        sums_(sums),
        tiles_(total_rows() + (sums ? 1 : 0), product.gemm),
        width_(ceil_div(tiles_.M, GROUP) * GROUP + (factors_.size() > 1 ? GROUP : 0)),
        packed_(packed.get<uint32_t>(product.steps(M) * width_)),
        left_(product.gemm.row_major ? Strided{packed_, product.steps(M), 1} : Strided{packed_, 1, width_}) {}

  int64_t strips() const { return ceil_div(columns_, STRIP); }

  // All of a^T -> `left`; with sums, a last row of ones.
  void pack() const {
    uint32_t* to = packed_;
    for (const Factor& f : factors_) {
      for (int64_t q = 0; q < f.rows; q += GROUP)
        pack(f.a, q, static_cast<int>(std::min<int64_t>(GROUP, f.rows - q)), to + q * left_.row);
      to += f.rows * left_.row;
    }
    if (sums_)
      for (int64_t s = 0; s < product_.steps(M_); s++) to[s * left_.step] = ones(s);
  }

  void strip(int64_t unit, Scratch& panel_scratch, Scratch& sum_scratch) const {
    const Gemm& g = product_.gemm;
    const int64_t widest = tiles_.M;
    uint32_t* data = panel_scratch.get<uint32_t>(product_.steps(BLOCK) * COLUMNS);
    float* sums = sum_scratch.get<float>(tiles_.M * STRIP + widest * COLUMNS);
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
          const Tile tile = tiles_[i];
          const uint32_t* from = left_.data + product_.steps(m) * left_.step + tile.row * left_.row;
          const LeftPart left{{from, left_.row, left_.step}, panel.steps};
          // the next block, a part at a time: rows are too far apart for the hardware to see what comes
          for (int64_t j = m + n + BLOCK * i / tiles_.count; j < std::min(M_, m + n + BLOCK * (i + 1) / tiles_.count); j++)
            for (int q = 0; q < columns; q += 64 / itemsize(b_.data.dtype)) __builtin_prefetch(b_.at(j, c + q));
          float* to = sums + ((c - begin) * tiles_.M + tile.row * COLUMNS);
          for (int p = 0; p < columns; p += g.width)
            g.tile(tile.rows, &left, 1, panel.at(p / GROUP, 0),
                   {to + p, m > 0, true, nullptr, nullptr, 0, DType::f32, std::min(g.width, columns - p)});
        }
      }
    }
    for (int64_t c = begin; c < end; c += COLUMNS) {
      const int64_t n = std::min<int64_t>(COLUMNS, end - c);
      const float* piece = sums + (c - begin) * tiles_.M;
      for (const Factor& f : factors_) {
        if (f.out.data) store(f, piece, c, n, turned);
        piece += f.rows * COLUMNS;
      }
      if (sums_) std::copy_n(piece, n, sums_ + c);
    }
  }

 private:
  // Columns [q, q + n) of a, as rows.
  void pack(const Source& a, int64_t q, int n, uint32_t* to) const {
    if (!product_.gemm.row_major) return product_.interleave(a, 0, M_, q, n, to, width_, GROUP);
    alignas(64) uint32_t block[GROUP * GROUP];
    const int64_t most = GROUP * product_.gemm.values;
    for (int64_t m = 0; m < M_; m += most) {
      const int64_t rows = std::min(most, M_ - m);
      product_.interleave(a, m, rows, q, n, block, GROUP, GROUP);
      kernels().f32.transpose(block, GROUP, static_cast<int>(product_.steps(rows)), n, to + product_.steps(m), left_.row);
    }
  }

  // Sums [rows, COLUMNS] of columns [c, c + n) -> out
  void store(const Factor& f, const float* sums, int64_t c, int64_t n, float* turned) const {
    const auto out = [&](int64_t i) { return static_cast<char*>(const_cast<void*>(f.out.data)) + i * itemsize(f.out.dtype); };
    const Gemm& g = product_.gemm;
    if (!transposed_) {
      for (int64_t q = 0; q < f.rows; q++) g.store(sums + q * COLUMNS, n, f.scale, f.out.dtype, out(q * columns_ + c));
      return;
    }
    for (int64_t q = 0; q < f.rows; q += GROUP)
      kernels().f32.transpose(sums + q * COLUMNS, COLUMNS, static_cast<int>(std::min<int64_t>(GROUP, f.rows - q)), n,
                              reinterpret_cast<uint32_t*>(turned) + q, f.rows);
    g.store(turned, n * f.rows, f.scale, f.out.dtype, out(c * f.rows));
  }

  int64_t total_rows() const {
    int64_t rows = 0;
    for (const Factor& f : factors_) rows += f.rows;
    return rows;
  }
  uint32_t ones(int64_t step) const {
    if (product_.type == DType::f32) return 0x3f800000;
    return 2 * step + 1 < M_ ? 0x3f803f80 : 0x3f80;
  }

  const Product& product_;
  std::vector<Factor> factors_;
  Source b_;
  int64_t columns_, M_;
  bool transposed_;
  float* sums_;
  Tiles tiles_;
  int64_t width_;  // a group of columns is packed whole, over what follows it
  uint32_t* packed_;
  Strided left_;  // `packed`, as it lies
};

void prepare(Team& team, const std::deque<LayerOperand>& operands) {
  share_units(
      team, operands, [](const LayerOperand& o) { return o.units(); },
      [](const LayerOperand& o, int64_t unit) { o.prepare(unit); });
  team.sync();
}

void packed_linear(DType dtype, int64_t M, const void* x, const std::vector<Layer>& layers) {
  Kept& memory = kept();
  const Product product(dtype);
  Left left{product, {{x, dtype}, layers.at(0).weight.K}, layers[0].weight.K, nullptr};
  const int64_t block = rows_per_block(product.gemm, M, left.steps());
  if (left.packs()) left.packed = memory.left.get<uint32_t>(block * left.steps());

  std::deque<LayerOperand> operands;
  std::vector<LowRank> ranks;
  std::vector<Output> outputs;
  int64_t numel = 0;
  for (const Layer& layer : layers) {
    const int64_t r = layer.adapter.r, rank_steps = product.steps(r);
    Kept::OfLayer& of_layer = memory.layer(operands.size());
    const LayerOperand& o = operands.emplace_back(product, dtype, layer.weight, layer.adapter, true, r, true, of_layer);
    std::vector<Stretch> stretches{{left.rows(), &o.weight, left.D, nullptr}};
    if (r) {
      uint32_t* tail = of_layer.tail.get<uint32_t>(M * rank_steps);
      if (r % product.gemm.values) std::fill_n(tail, M * rank_steps, 0u);
      const float scale = o.dropout.active() ? o.dropout.scale() : 1.0f;
      ranks.push_back({r,
                       o.right,
                       o.dropout.active() ? &o.dropout : nullptr,
                       {layer.h, dtype},
                       scale,
                       scale * layer.adapter.scaling,
                       tail});
      stretches.push_back({{tail, rank_steps, false}, &o.tail, r, nullptr});
    }
    outputs.emplace_back(product, layer.weight.N, layer.y, layer.bias, stretches);
    numel += layer.weight.numel();
  }

  with_team(threads_for(M, numel), [&](Team& team) {
    static thread_local Scratch tile_scratch;
    prepare(team, operands);
    for (int64_t m0 = 0; m0 < M; m0 += block) {
      const Tiles tiles(std::min(block, M - m0), product.gemm);
      if (left.packs() || !ranks.empty()) {
        team.share(tiles.count, [&](int64_t i) {
          left.pack(m0, tiles[i]);
          for (const LowRank& rank : ranks) rank.multiply(left, m0, tiles[i], tile_scratch);
        });
        team.sync();
      }
      multiply(team, product, m0, tiles, outputs, dtype);
      team.sync();
    }
    product.release();
  });
}

}  // namespace

void qlora_linear(DType dtype, int64_t M, const void* x, const std::vector<Layer>& layers) {
  if (M == 0) return;
  if (std::all_of(layers.begin(), layers.end(), [&](const Layer& layer) { return takes_few_rows(dtype, M, layer.weight); }))
    qlora_linear_few_rows(dtype, M, x, layers);
  else
    packed_linear(dtype, M, x, layers);
}

void qlora_linear_backward(DType dtype, int64_t M, const void* x, const std::vector<LayerGradients>& layers, void* dx) {
  Kept& memory = kept();
  const Product product(dtype);
  const int64_t K = layers.at(0).weight.K;
  std::vector<Left> lefts;
  int64_t steps = 0, packed_steps = 0, numel = 0;
  bool prepares = dx;
  for (const LayerGradients& layer : layers) {
    const Left& left = lefts.emplace_back(Left{product, {{layer.dy, dtype}, layer.weight.N}, layer.weight.N, nullptr});
    steps += left.steps();
    packed_steps += left.packs() ? left.steps() : 0;
    numel += layer.weight.numel();
    prepares |= layer.dA != nullptr;
  }
  const int64_t block = rows_per_block(product.gemm, M, steps);
  uint32_t* packed = memory.left.get<uint32_t>(prepares ? block * packed_steps : 0);

  std::deque<LayerOperand> operands;
  std::deque<Outer> outers;
  std::vector<LowRank> ranks;  // r 0: no adapter
  std::vector<Stretch> stretches;
  std::vector<Outer::Factor> gs;  // of adapters without dropout
  for (size_t i = 0; i < layers.size(); i++) {
    const auto& [w, adapter, dy, h, dA, dB, dbias] = layers[i];
    const int64_t N = w.N, r = dx || dA ? adapter.r : 0, rank_steps = product.steps(r);
    Kept::OfLayer& of_layer = memory.layer(i);
    const LayerOperand& o = operands.emplace_back(product, dtype, w, adapter, false, r, dx != nullptr, of_layer);
    const Dropout* dropout = o.dropout.active() ? &o.dropout : nullptr;
    const float scale = adapter.scaling * (dropout ? dropout->scale() : 1.0f);
    Left& left = lefts[i];
    if (prepares && left.packs()) {
      left.packed = packed;
      packed += block * left.steps();
    }
    LowRank rank{r, o.right, nullptr, {nullptr, product.type}, 1.0f, scale, nullptr};
    stretches.push_back({left.rows(), &o.weight, N, nullptr});
    if (r) {
      rank.products.data = of_layer.g.get<char>(M * r * itemsize(product.type));
      rank.tail = of_layer.tail.get<uint32_t>(M * rank_steps);
      if (r % product.gemm.values) std::fill_n(rank.tail, M * rank_steps, 0u);
      stretches.push_back({{rank.tail, rank_steps, false}, &o.tail, r, dropout});
    }
    ranks.push_back(rank);
    if (dA) {
      const Outer::Factor g{{rank.products, r}, r, scale, {dA, adapter.A.dtype}};
      if (dropout)
        outers.emplace_back(product, std::vector{g}, Source{{x, dtype}, K, dropout}, K, M, false, nullptr, of_layer.packed_g);
      else
        gs.push_back(g);
    }
    if (dB || dbias) {
      std::vector<Outer::Factor> hs;
      if (dB) hs.push_back({{{h, dtype}, adapter.r}, adapter.r, adapter.scaling, {dB, adapter.B.dtype}});
      outers.emplace_back(product, hs, left.source, N, M, true, dbias, of_layer.packed_h);
    }
  }
  if (!gs.empty()) outers.emplace_back(product, gs, Source{{x, dtype}, K}, K, M, false, nullptr, memory.packed_gs);
  std::vector<Output> outputs;
  if (dx) outputs.emplace_back(product, K, dx, Dense{}, stretches);

  with_team(threads_for(M, numel), [&](Team& team) {
    static thread_local Scratch tile_scratch, strip_scratch, sum_scratch;
    prepare(team, operands);
    for (int64_t m0 = 0; m0 < M && prepares; m0 += block) {
      const Tiles tiles(std::min(block, M - m0), product.gemm);
      team.share(tiles.count * lefts.size(), [&](int64_t unit) {
        const int64_t layer = unit / tiles.count;
        const Tile tile = tiles[unit % tiles.count];
        if (dx || ranks[layer].r) lefts[layer].pack(m0, tile);
        if (ranks[layer].r) ranks[layer].multiply(lefts[layer], m0, tile, tile_scratch);
      });
      team.sync();
      multiply(team, product, m0, tiles, outputs, dtype);
      team.sync();
    }
    team.share(outers.size(), [&](int64_t i) { outers[i].pack(); });
    team.sync();
    share_units(
        team, outers, [](const Outer& o) { return o.strips(); },
        [&](const Outer& o, int64_t i) { o.strip(i, strip_scratch, sum_scratch); });
    product.release();
  });
}

}  // namespace lora_kernels::cpu
