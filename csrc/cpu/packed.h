// out [M, C] = left [M, D] x right [D, C], right decoded or converted panel by panel, with the adapter as more steps of the
// same contraction.  Forward and dx are this with W^T and W for `right`.
//
// left is packed in tiles of a few rows, right in panels of COLUMNS columns that stay in the L2 cache; a tile of sums
// lives in registers for the whole contraction (a block of it, where a panel would not fit) and is rounded once.  Every sum is
// taken by one thread in an order that depends on the shapes alone, so the number of threads never changes a bit.
//
// Several layers on one x: in forward their outputs lie side by side and the packed x is shared; for dx they are one long
// contraction, so that the sum over the layers is rounded once.
#pragma once
#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <cmath>
#include <vector>

#include "../ops.h"
#include "kernels.h"
#include "parallel.h"

namespace lora_kernels::cpu {

constexpr int64_t LEFT_BYTES = 8 << 20;  // of packed rows, in L3
constexpr int64_t SPAN = 4;              // panels in a strip, where the whole contraction does not fit in one
constexpr int64_t MAX_STRIDE = 3 << 10;  // of rows that are multiplied where they lie
constexpr int64_t CHUNK = 256;           // values converted at a time

// Bytes of a panel: five eighths of a core's L2 cache, of 1 MB where the system does not say.
inline int64_t panel_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t cache = 0;
#endif
  return (cache > 0 ? std::clamp<int64_t>(cache, 256 << 10, 2 << 20) : 1 << 20) / 8 * 5;
}

// Below this many multiplications a second thread costs more than it does.
inline int64_t threads_for(int64_t M, int64_t numel) { return (M + 8) * numel < (2 << 20) ? 1 : torch::num_threads(); }

inline bool multiplies_bf16() { return kernels().bf16.tile; }

// For x of `dtype`: bf16 where the CPU multiplies that, else float32.
inline const Gemm& gemm_of(DType dtype) {
  const Kernels& k = kernels();
  if (dtype != DType::bf16 || !multiplies_bf16()) return k.f32;
  const Gemm* library = k.library ? k.library() : nullptr;
  return library ? *library : k.bf16;
}

// The dropout mask of x [M, K]: a function of the seed and of an element's index.
class Dropout {
 public:
  Dropout(const Adapter& adapter, int64_t K)
      : K_(K),
        seed_(adapter.seed ? static_cast<uint64_t>(*adapter.seed) : 0),
        threshold_(static_cast<uint64_t>(std::nearbyint(adapter.dropout_p * 4294967296.0))),
        active_(adapter.dropout_p > 0),
        scale_(1.0f / static_cast<float>(1 - adapter.dropout_p)) {}

  bool active() const { return active_; }
  float scale() const { return scale_; }  // of the kept values, applied where they have been summed
  void apply(int64_t m, int64_t k, int64_t n, float* values) const {
    kernels().drop_f32(values, seed_, threshold_, m * K_ + k, n, values);
  }

 private:
  int64_t K_;
  uint64_t seed_, threshold_;
  bool active_;
  float scale_;
};

// A row-major matrix that is packed for a product, converted on the way to the type that is multiplied.
struct Source {
  Dense data;
  int64_t ld;
  const Dropout* dropout = nullptr;

  // [row, column .. column + n) -> dst
  void load(const Gemm& g, int64_t row, int64_t column, int64_t n, void* dst) const {
    if (!dropout) return g.convert(data.dtype, at(row, column), n, dst);
    float values[CHUNK];
    kernels().f32.convert(data.dtype, at(row, column), n, values);
    dropout->apply(row, column, n, values);
    g.convert(DType::f32, values, n, dst);
  }
  void load_row(const Gemm& g, int64_t row, int64_t n, void* dst) const {
    for (int64_t k = 0; k < n; k += CHUNK)
      load(g, row, k, std::min(CHUNK, n - k), static_cast<char*>(dst) + k * (4 / g.values));
  }
  const void* at(int64_t row, int64_t column) const {
    return static_cast<const char*>(data.data) + (row * ld + column) * itemsize(data.dtype);
  }
};

// A kind of product: the kernels, and the type that is multiplied.
struct Product {
  const Gemm& gemm;
  DType type;

  explicit Product(DType dtype) : gemm(gemm_of(dtype)), type(gemm.values == 2 ? DType::bf16 : DType::f32) {}

  int64_t steps(int64_t n) const { return (n + gemm.values - 1) / gemm.values; }
  void release() const {
    if (gemm.release) gemm.release();
  }
  bool direct(const Source& s) const { return s.data.dtype == type && !s.dropout; }

  // source [row .. row + rows, column .. column + n) -> dst [steps of n][rows <= 16]; column and n as for `steps`
  void transpose(const Source& s, int64_t row, int rows, int64_t column, int64_t n, uint32_t* dst, int64_t ld_dst) const {
    if (direct(s)) return gemm.transpose(s.at(row, column), s.ld, rows, n, dst, ld_dst);
    alignas(64) float buffer[GROUP * CHUNK];
    for (int64_t c = 0; c < n; c += CHUNK) {
      const int64_t m = std::min(CHUNK, n - c);
      for (int i = 0; i < rows; i++)
        s.load(gemm, row + i, column + c, m, reinterpret_cast<char*>(buffer) + i * CHUNK * itemsize(type));
      gemm.transpose(buffer, CHUNK, rows, m, dst + c / gemm.values * ld_dst, ld_dst);
    }
  }

  // source [row .. row + rows, 0 .. n) -> a packed tile of the left operand
  void pack_tile(const Source& s, int64_t row, int rows, int64_t n, uint32_t* dst) const {
    if (!gemm.row_major) return transpose(s, row, rows, 0, n, dst, rows);
    for (int i = 0; i < rows; i++, dst += steps(n)) {
      dst[steps(n) - 1] = 0;  // past an odd end
      s.load_row(gemm, row + i, n, dst);
    }
  }
  // What `pack_tile` wrote at `data`, a tile of `steps` steps, as an operand that begins at `step`.  A row-major tile has its
  // rows one after the other, the other kind its steps.
  Strided packed_tile(const uint32_t* data, int rows, int64_t steps, int64_t step) const {
    return gemm.row_major ? Strided{data + step, steps, 1} : Strided{data + step * rows, 1, rows};
  }

  // source [row .. row + n, column .. column + columns <= 64) -> dst [steps of n][columns]
  void interleave(const Source& s, int64_t row, int64_t n, int64_t column, int columns, uint32_t* dst, int64_t ld_dst,
                  int64_t group_stride) const {
    if (direct(s)) return gemm.interleave(s.at(row, column), s.ld, n, columns, dst, ld_dst, group_stride);
    constexpr int64_t R = 64;
    alignas(64) float buffer[R * COLUMNS];
    for (int64_t i = 0; i < n; i += R) {
      const int64_t m = std::min(R, n - i);
      for (int64_t j = 0; j < m; j++)
        s.load(gemm, row + i + j, column, columns, reinterpret_cast<char*>(buffer) + j * COLUMNS * itemsize(type));
      gemm.interleave(buffer, COLUMNS, m, columns, dst + i / gemm.values * ld_dst, ld_dst, group_stride);
    }
  }

  // [d0 .. d0 + n, column .. column + columns <= 64) of source, or of its transpose -> dst [steps of n][columns]
  void pack_right(const Source& s, bool transposed, int64_t d0, int64_t n, int64_t column, int columns, uint32_t* dst,
                  int64_t ld_dst, int64_t group_stride) const {
    if (!transposed) return interleave(s, d0, n, column, columns, dst, ld_dst, group_stride);
    for (int c = 0; c < columns; c += GROUP, dst += group_stride)
      transpose(s, column + c, std::min(GROUP, columns - c), d0, n, dst, ld_dst);
  }
};

// COLUMNS columns of a right operand, in pieces of `width`.
struct Panel {
  uint32_t* data;
  int64_t steps;
  int width;
  uint32_t* at(int group, int64_t step) const {
    const int column = group * GROUP;
    return data + (column / width * steps + step) * width + column % width;
  }
  int64_t group_stride() const { return width >= COLUMNS ? GROUP : width * steps; }
};

// A right operand [D, columns], packed panel by panel.
class Right {
 public:
  virtual ~Right() = default;
  // [d0 .. d1, c .. c + COLUMNS), anything past the last column, which no tile stores, to the panel's steps from `step` on;
  // d0 a multiple of 64
  virtual void fill(int64_t c, int64_t d0, int64_t d1, const Panel& panel, int64_t step) const = 0;
};

// W^T or W
class WeightPanels : public Right {
 public:
  // absmax: of the whole weight, decoded
  WeightPanels(const Weight& w, const float* absmax, const Product& product, DType dtype, bool transposed)
      : w_(w),
        absmax_(absmax),
        product_(product),
        shift_(w.shift()),
        transposed_(transposed),
        direct_(product.gemm.decode_rows && w.K % 32 == 0) {
    const Kernels& k = kernels();
    decode_ = dtype == DType::f32     ? k.decode_f32
              : dtype == DType::f16   ? k.decode_f16_as_f32
              : product.type == dtype ? k.decode_bf16
                                      : k.decode_bf16_as_f32;
  }

  void fill(int64_t c, int64_t d0, int64_t d1, const Panel& panel, int64_t step) const override {
    transposed_ ? rows(c, d0, d1, panel, step) : columns(c, d0, d1, panel, step);
  }

 private:
  // W^T [k0 .. k1, n0 .. n0 + COLUMNS)
  void rows(int64_t n0, int64_t k0, int64_t k1, const Panel& panel, int64_t step) const {
    const Gemm& g = product_.gemm;
    const int64_t size = itemsize(product_.type);
    for (int group = 0; group < COLUMNS / GROUP; group++) {
      const int64_t n = n0 + group * GROUP;
      const int rows = static_cast<int>(std::clamp<int64_t>(w_.N - n, 0, GROUP));
      if (direct_ && rows == GROUP) {
        g.decode_rows(w_.packed, w_.format->code, absmax_, shift_, w_.K, n, k0, k1, panel.at(group, step), panel.width);
        continue;
      }
      alignas(64) float buffer[GROUP * CHUNK];
      for (int64_t k = k0; k < k1 && rows; k += CHUNK) {
        const int64_t m = std::min(CHUNK, k1 - k);
        for (int i = 0; i < rows; i++) elements((n + i) * w_.K + k, m, reinterpret_cast<char*>(buffer) + i * CHUNK * size);
        g.transpose(buffer, CHUNK, rows, m, panel.at(group, step + (k - k0) / g.values), panel.width);
      }
    }
  }

  // W [n0 .. n1, k0 .. k0 + COLUMNS)
  void columns(int64_t k0, int64_t n0, int64_t n1, const Panel& panel, int64_t step) const {
    const Gemm& g = product_.gemm;
    const int64_t columns = std::min<int64_t>(COLUMNS, w_.K - k0), size = itemsize(product_.type);
    if (direct_)
      return g.decode_columns(w_.packed, w_.format->code, absmax_, shift_, w_.K, n0, n1, k0, static_cast<int>(columns),
                              panel.at(0, step), panel.width);
    constexpr int64_t R = 32;
    alignas(64) float buffer[R * COLUMNS];
    for (int64_t n = n0; n < n1; n += R) {
      const int64_t rows = std::min(R, n1 - n);
      for (int64_t i = 0; i < rows; i++)
        elements((n + i) * w_.K + k0, columns, reinterpret_cast<char*>(buffer) + i * COLUMNS * size);
      g.interleave(buffer, COLUMNS, rows, static_cast<int>(columns), panel.at(0, step + (n - n0) / g.values), panel.width,
                   panel.group_stride());
    }
  }

  void elements(int64_t begin, int64_t n, void* out) const {
    decode_(w_.packed, w_.format->code, absmax_, shift_, begin, begin + n, out);
  }

  const Weight& w_;
  const float* absmax_;
  const Product& product_;
  const int shift_;
  bool transposed_, direct_;
  void (*decode_)(const uint8_t*, const float*, const float*, int, int64_t, int64_t, void*);
};

// B^T [r, N] or A [r, K]
class FactorPanels : public Right {
 public:
  FactorPanels(const Source& factor, int64_t columns, const Product& product, bool transposed)
      : factor_(factor), columns_(columns), product_(product), transposed_(transposed) {}

  void fill(int64_t c, int64_t d0, int64_t d1, const Panel& panel, int64_t step) const override {
    product_.pack_right(factor_, transposed_, d0, d1 - d0, c, static_cast<int>(std::min<int64_t>(COLUMNS, columns_ - c)),
                        panel.at(0, step), panel.width, panel.group_stride());
  }

 private:
  Source factor_;
  int64_t columns_;
  const Product& product_;
  bool transposed_;
};

struct Tile {
  int64_t row;
  int rows;
};

// Rows cut into tiles of nearly equal height, and a last one of those that are no multiple of the grain.
struct Tiles {
  int64_t M, grain, even, even_count, count;
  Tiles(int64_t M, const Gemm& gemm)
      : M(M), grain(gemm.grain), even(M & -grain), even_count(ceil_div(even, gemm.rows)), count(even_count + (even < M)) {}
  Tile operator[](int64_t i) const { return {begin(i), static_cast<int>(begin(i + 1) - begin(i))}; }

 private:
  int64_t begin(int64_t i) const {
    if (i >= even_count) return i == even_count ? even : M;
    return (even * i / even_count + grain - 1) & -grain;
  }
};

// Rows of a left operand, by steps: packed tiles of one block of rows, or a row-major matrix of all.
struct Rows {
  const uint32_t* data;
  int64_t ld;  // dwords
  bool packed;

  // A tile of the block of rows that begins at m0.
  Strided at(const Product& product, int64_t m0, const Tile& tile, int64_t step) const {
    if (packed) return product.packed_tile(data + tile.row * ld, tile.rows, ld, step);
    return {data + (m0 + tile.row) * ld + step, ld, 1};
  }
};

// A matrix [M, D] as a left operand.
struct Left {
  const Product& product;
  Source source;
  int64_t D;
  uint32_t* packed;  // the tiles of a block, where it packs

  // A matrix whose rows are close together is read as fast where it lies; a library's tiles read any as fast.
  bool packs() const {
    return !product.direct(source) || D % product.gemm.values ||
           (!product.gemm.row_major && D * itemsize(product.type) > MAX_STRIDE);
  }
  int64_t steps() const { return product.steps(D); }

  Rows rows() const {
    if (packs()) return {packed, steps(), true};
    return {static_cast<const uint32_t*>(source.data.data), source.ld / product.gemm.values, false};
  }
  void pack(int64_t m0, const Tile& tile) const {
    if (packs()) product.pack_tile(source, m0 + tile.row, tile.rows, D, packed + tile.row * steps());
  }
};

// What an adapter makes of a left operand: products [M, r] = left x right, times scale, and the tail [M, r], which follows left
// in the contraction.
struct LowRank {
  int64_t r;
  const uint32_t* right;   // [ceil(r / 16)][steps of D][16]
  const Dropout* dropout;  // of left, or null
  Dense products;
  float scale, tail_scale;
  uint32_t* tail;  // [M, steps of r]

  // For the rows of a tile, which has been packed.
  void multiply(const Left& left, int64_t m0, const Tile& tile, Scratch& scratch) const {
    const Product& product = left.product;
    const int64_t m = m0 + tile.row, steps = left.steps(), ld = product.steps(r);
    LeftPart factor{left.rows().at(product, m0, tile, 0), steps};
    if (dropout) {
      Source dropped = left.source;
      dropped.dropout = dropout;
      uint32_t* t = scratch.get<uint32_t>(steps * tile.rows);
      product.pack_tile(dropped, m, tile.rows, left.D, t);
      factor.left = product.packed_tile(t, tile.rows, steps, 0);
    }
    for (int64_t q = 0; q < r; q += GROUP)
      product.gemm.rank_tile(
          tile.rows, factor, right + q * steps, static_cast<int>(std::min<int64_t>(GROUP, r - q)), scale,
          const_cast<char*>(static_cast<const char*>(products.data)) + (m * r + q) * itemsize(products.dtype), r,
          products.dtype, tail_scale, tail + m * ld + q / product.gemm.values, ld * product.gemm.values);
  }
};

// A stretch of a contraction: a left operand [M, D] and a right one [D, columns].
struct Stretch {
  Rows left;
  const Right* right;
  int64_t D;
  const Dropout* dropout;  // of their product, or null
};

// out [M, columns]: the sum of the products of its stretches, and the bias.
class Output {
 public:
  static constexpr int MAX_PARTS = 8;

  // A block of the contraction, of which a panel holds COLUMNS columns.
  struct Block {
    struct Piece {
      Rows left;
      const Right* right;
      int64_t d0, d1;
    };
    Piece pieces[MAX_PARTS];
    int n;
    int64_t steps;
    const Dropout* dropout;  // of the whole block, or null
  };

  Output(const Product& product, int64_t columns, void* out, Dense bias, const std::vector<Stretch>& stretches)
      : columns(columns), out(out), bias(bias) {
    // what is masked comes first, so that the last block rounds the sums
    const int64_t most = panel_bytes() / (COLUMNS * 4) / CUT * CUT;
    int64_t rest = 0;
    for (const Stretch& s : stretches) s.dropout ? cut(product, s, most) : void(rest += product.steps(s.D));
    const int64_t even = ceil_div(ceil_div(rest, ceil_div(rest, most)), CUT) * CUT;
    for (const Stretch& s : stretches)
      if (!s.dropout) cut(product, s, even);
  }

  int64_t panels() const { return ceil_div(columns, COLUMNS); }

  const int64_t columns;
  void* const out;
  const Dense bias;
  std::vector<Block> blocks;

 private:
  static constexpr int64_t CUT = 64;  // steps between which a stretch is cut

  // Appends a stretch to the blocks of up to `most` steps.
  void cut(const Product& product, const Stretch& s, int64_t most) {
    const int64_t steps = product.steps(s.D);
    for (int64_t step = 0, n; step < steps; step += n) {
      const bool open = !blocks.empty() && !s.dropout && !blocks.back().dropout && blocks.back().n < MAX_PARTS;
      int64_t room = open ? most - blocks.back().steps : 0;
      if (room < steps - step) room = room / CUT * CUT;
      if (room <= 0) {
        blocks.push_back({{}, 0, 0, s.dropout});
        room = most;
      }
      n = std::min(steps - step, room);
      Block& block = blocks.back();
      block.pieces[block.n++] = {s.left, s.right, step * product.gemm.values, std::min(s.D, (step + n) * product.gemm.values)};
      block.steps += n;
    }
  }
};

// One block of rows, [m0, m0 + tiles.M), of each output.
inline void multiply(Team& team, const Product& product, int64_t m0, const Tiles& tiles, const std::vector<Output>& outputs,
                     DType dtype) {
  static thread_local Scratch panel_scratch, partial_scratch;
  const Gemm& g = product.gemm;
  int64_t panel_steps = 0, panels = 0;
  bool partial_sums = false;
  for (const Output& o : outputs) {
    panels += o.panels();
    partial_sums |= o.blocks.size() > 1;
    for (const Output::Block& block : o.blocks) panel_steps = std::max(panel_steps, block.steps);
  }
  uint32_t* panel_data = panel_scratch.get<uint32_t>(panel_steps * COLUMNS);
  // A strip of panels takes one block of the contraction together: of dx, its rows of W lie in no more pages than the TLB
  // holds.
  const int64_t span = partial_sums ? SPAN : 1;
  float* partials = partial_sums ? partial_scratch.get<float>(span * tiles.M * COLUMNS) : nullptr;
  alignas(64) float bias[COLUMNS], masked[MAX_ROWS * COLUMNS];

  auto part = [&](const Output& o, size_t b, int64_t c, float* partial, int64_t tile0, int64_t tile1) {
    const Output::Block& block = o.blocks[b];
    const bool first = b == 0, last = b + 1 == o.blocks.size();
    const int columns = static_cast<int>(std::min<int64_t>(COLUMNS, o.columns - c));
    const Panel panel{panel_data, block.steps, g.width};
    LeftPart parts[Output::MAX_PARTS];
    int64_t step = 0;
    for (int j = 0; j < block.n; step += parts[j++].steps) {
      const auto& [left, right, d0, d1] = block.pieces[j];
      parts[j].steps = product.steps(d1 - d0);
      right->fill(c, d0, d1, panel, step);
    }
    if (o.bias.data && last)
      kernels().f32.convert(o.bias.dtype, static_cast<const char*>(o.bias.data) + c * itemsize(o.bias.dtype), columns, bias);
    for (int64_t i = tile0; i < tile1; i++) {
      const Tile tile = tiles[i];
      for (int j = 0; j < block.n; j++)
        parts[j].left = block.pieces[j].left.at(product, m0, tile, product.steps(block.pieces[j].d0));
      for (int p = 0; p < columns; p += g.width) {
        const int width = std::min(g.width, columns - p);
        float* sums = block.dropout ? masked + p : partial ? partial + tile.row * COLUMNS + p : nullptr;
        char* to = static_cast<char*>(o.out) + ((m0 + tile.row) * o.columns + c + p) * itemsize(dtype);
        g.tile(tile.rows, parts, block.n, panel.at(p / GROUP, 0),
               {sums, !first && !block.dropout, !last, o.bias.data ? bias + p : nullptr, to, o.columns, dtype, width});
      }
      if (!block.dropout) continue;
      for (int m = 0; m < tile.rows; m++) {
        float* sum = partial + (tile.row + m) * COLUMNS;
        block.dropout->apply(m0 + tile.row + m, c, columns, masked + m * COLUMNS);
        for (int j = 0; j < columns; j++) sum[j] = (first ? 0.0f : sum[j]) + masked[m * COLUMNS + j];
      }
    }
  };
  // Panels [panel, panel + n) of all outputs.
  auto strip = [&](int64_t panel, int64_t n, int64_t tile0, int64_t tile1) {
    for (const Output& o : outputs) {
      const int64_t begin = std::max<int64_t>(panel, 0), end = std::min(panel + n, o.panels());
      for (size_t b = 0; b < o.blocks.size(); b++)
        for (int64_t i = begin; i < end; i++)
          part(o, b, i * COLUMNS, partials ? partials + (i - begin) * tiles.M * COLUMNS : nullptr, tile0, tile1);
      panel -= o.panels();
    }
  };
  // As many strips as every thread can have, then as many panels; the rest is shared by rows.
  const int64_t strips = panels / span / team.threads * team.threads, narrow = strips * span;
  const int64_t whole = narrow + (panels - narrow) / team.threads * team.threads;
  team.share(strips + whole - narrow, [&](int64_t i) {
    i < strips ? strip(i * span, span, 0, tiles.count) : strip(narrow + i - strips, 1, 0, tiles.count);
  });
  const int64_t tile0 = tiles.count * team.thread / team.threads, tile1 = tiles.count * (team.thread + 1) / team.threads;
  for (int64_t p = whole; p < panels && tile0 < tile1; p++) strip(p, 1, tile0, tile1);
}

}  // namespace lora_kernels::cpu
