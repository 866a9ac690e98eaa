// out [M, C] = left [M, D] x right [D, C], right decoded or converted panel by panel, with the adapter as more steps of the
// same contraction.  Forward and dx are this with W^T and W for `right`.
//
// left is packed in tiles of up to ROWS rows, right in panels of COLUMNS columns that stay in the L2 cache; a tile of sums
// lives in registers for the whole contraction (a block of it, where a panel would not fit) and is rounded once.  Every sum is
// taken by one thread in an order that depends on the shapes alone, so the number of threads never changes a bit.
#pragma once
#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <cmath>

#include "../codebooks.h"
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
inline int64_t threads_for(int64_t M, int64_t numel) { return (M + 8) * numel < (2 << 20) ? 1 : at::get_num_threads(); }

inline bool multiplies_bf16() { return kernels().bf16.tile; }

// The dropout mask of x [M, K]: a function of the seed and of an element's index.
class Dropout {
 public:
  Dropout(const Adapter& adapter, int64_t K)
      : K_(K),
        seed_(adapter.seed),
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

  // x of `dtype`: bf16 where the CPU multiplies that, else float32
  explicit Product(DType dtype)
      : gemm(dtype == DType::bf16 && multiplies_bf16() ? kernels().bf16 : kernels().f32),
        type(gemm.values == 2 ? DType::bf16 : DType::f32) {}

  int64_t steps(int64_t n) const { return (n + gemm.values - 1) / gemm.values; }
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

// The quantized weight as a right operand.
class WeightPanels {
 public:
  // absmax: of the whole weight, decoded
  WeightPanels(const Weight& w, const float* absmax, const Product& product, DType dtype)
      : w_(w),
        absmax_(absmax),
        product_(product),
        codebook_(w.quant_type == QuantType::nf4 ? NF4 : FP4),
        straight_(product.gemm.decode_rows && w.K % 32 == 0) {
    while ((int64_t{1} << shift_) < w.blocksize) shift_++;
    const Kernels& k = kernels();
    decode_ = dtype == DType::f32     ? k.decode_f32
              : dtype == DType::f16   ? k.decode_f16_as_f32
              : product.type == dtype ? k.decode_bf16
                                      : k.decode_bf16_as_f32;
  }

  // W^T [k0 .. k1, n0 .. n0 + COLUMNS), anything past the last column, which no tile stores; k0 a multiple of 64
  void transposed(int64_t n0, int64_t k0, int64_t k1, const Panel& panel) const {
    const Gemm& g = product_.gemm;
    const int64_t size = itemsize(product_.type);
    for (int group = 0; group < COLUMNS / GROUP; group++) {
      const int64_t n = n0 + group * GROUP;
      const int rows = static_cast<int>(std::clamp<int64_t>(w_.N - n, 0, GROUP));
      if (straight_ && rows == GROUP) {
        g.decode_rows(w_.packed, codebook_, absmax_, shift_, w_.K, n, k0, k1, panel.at(group, 0), panel.width);
        continue;
      }
      alignas(64) float buffer[GROUP * CHUNK];
      for (int64_t k = k0; k < k1 && rows; k += CHUNK) {
        const int64_t m = std::min(CHUNK, k1 - k);
        for (int i = 0; i < rows; i++) elements((n + i) * w_.K + k, m, reinterpret_cast<char*>(buffer) + i * CHUNK * size);
        g.transpose(buffer, CHUNK, rows, m, panel.at(group, (k - k0) / g.values), panel.width);
      }
    }
  }

  // W [n0 .. n1, k0 .. k0 + COLUMNS); n0 a multiple of 64
  void straight(int64_t k0, int64_t n0, int64_t n1, const Panel& panel) const {
    const Gemm& g = product_.gemm;
    const int64_t columns = std::min<int64_t>(COLUMNS, w_.K - k0), size = itemsize(product_.type);
    if (straight_)
      return g.decode_columns(w_.packed, codebook_, absmax_, shift_, w_.K, n0, n1, k0, static_cast<int>(columns),
                              panel.at(0, 0), panel.width);
    constexpr int64_t R = 32;
    alignas(64) float buffer[R * COLUMNS];
    for (int64_t n = n0; n < n1; n += R) {
      const int64_t rows = std::min(R, n1 - n);
      for (int64_t i = 0; i < rows; i++)
        elements((n + i) * w_.K + k0, columns, reinterpret_cast<char*>(buffer) + i * COLUMNS * size);
      g.interleave(buffer, COLUMNS, rows, static_cast<int>(columns), panel.at(0, (n - n0) / g.values), panel.width,
                   panel.group_stride());
    }
  }

 private:
  void elements(int64_t begin, int64_t n, void* out) const {
    decode_(w_.packed, codebook_, absmax_, shift_, begin, begin + n, out);
  }

  const Weight& w_;
  const float* absmax_;
  const Product& product_;
  const float* codebook_;
  bool straight_;
  int shift_ = 0;
  void (*decode_)(const uint8_t*, const float*, const float*, int, int64_t, int64_t, void*);
};

// Rows cut into tiles of nearly equal height.
struct Tiles {
  int64_t M, count;
  explicit Tiles(int64_t M) : M(M), count(ceil_div(M, ROWS)) {}
  int64_t begin(int64_t i) const { return M * i / count; }
  int rows(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
};

// The left operand [_, D], and what the adapter makes of it: products [_, r] = source x right, times scale, and the tail
// [_, r], which follows `source` in the contraction.
struct Left {
  const Product& product;
  Source source;
  int64_t D, r;            // r 0: no adapter
  const uint32_t* right;   // [ceil(r / 16)][steps of D][16]
  const Dropout* dropout;  // of `source`, for the adapter only
  Dense products;
  float scale, tail_scale;
  uint32_t* tail;  // [_, steps of r]

  // A matrix whose rows are close together is read as fast where it lies.
  bool packs() const { return !product.direct(source) || D % product.gemm.values || D * itemsize(product.type) > MAX_STRIDE; }

  Strided tile(const uint32_t* packed, int64_t m0, const Tiles& tiles, int64_t i, int64_t d) const {
    if (packs()) return {packed + tiles.begin(i) * product.steps(D) + product.steps(d) * tiles.rows(i), 1, tiles.rows(i)};
    return {static_cast<const uint32_t*>(source.at(m0 + tiles.begin(i), d)), source.ld / product.gemm.values, 1};
  }
  Strided tail_of(int64_t m) const { return {tail + m * product.steps(r), product.steps(r), 1}; }

  // Rows [m0, m0 + tiles.M): packed [tile][steps of D][rows], products and tail
  void prepare(int64_t m0, const Tiles& tiles, int64_t i, uint32_t* packed, Scratch& scratch) const {
    const int64_t m = m0 + tiles.begin(i), steps = product.steps(D);
    const int rows = tiles.rows(i);
    Strided factor = tile(packed, m0, tiles, i, 0);
    if (packs()) product.transpose(source, m, rows, 0, D, packed + tiles.begin(i) * steps, rows);
    if (!r) return;
    if (dropout) {
      Source dropped = source;
      dropped.dropout = dropout;
      uint32_t* t = scratch.get<uint32_t>(steps * rows);
      product.transpose(dropped, m, rows, 0, D, t, rows);
      factor = {t, 1, rows};
    }
    for (int64_t q = 0; q < r; q += GROUP)
      product.gemm.rank_tile(
          rows, factor, steps, right + q * steps, static_cast<int>(std::min<int64_t>(GROUP, r - q)), scale,
          const_cast<char*>(static_cast<const char*>(products.data)) + (m * r + q) * itemsize(products.dtype), r,
          products.dtype, tail_scale, tail + m * product.steps(r) + q / product.gemm.values,
          product.steps(r) * product.gemm.values);
  }
};

struct Right {
  int64_t columns;
  const Dense* bias;       // [columns] or null
  const Dropout* dropout;  // of the adapter's part of the product, or null
};

// One block of rows: out [m0 .. m0 + tiles.M, columns] (+)= packed left x panels.  weight(c, d0, d1, panel) fills a panel's
// steps of [d0, d1), adapter(c, panel, step) those of the adapter, from `step` on.
template <class WeightFill, class AdapterFill>
void multiply(Team& team, const Left& left, const uint32_t* packed, int64_t m0, const Tiles& tiles, const Right& right,
              const WeightFill& weight, const AdapterFill& adapter, void* out, DType out_dtype, bool accumulate) {
  static thread_local Scratch panel_scratch, partial_scratch;
  const Gemm& g = left.product.gemm;
  const int64_t D = left.D, r = left.r, C = right.columns, rank_steps = left.product.steps(r);
  const int64_t blocks = ceil_div(left.product.steps(D), panel_bytes() / (COLUMNS * 4));
  const int64_t block = ceil_div(ceil_div(D, blocks), 64) * 64;
  const int64_t panel_steps = left.product.steps(std::min(block, D)) + rank_steps;
  uint32_t* panel_data = panel_scratch.get<uint32_t>(panel_steps * COLUMNS);
  // A strip of panels takes one block of the contraction together: of dx, its rows of W lie in no more pages than the TLB
  // holds.
  const int64_t span = block < D ? SPAN : 1;
  float* partials = block < D ? partial_scratch.get<float>(span * tiles.M * COLUMNS) : nullptr;
  alignas(64) float bias[COLUMNS], extra[ROWS * COLUMNS];

  auto part = [&](int64_t c, int64_t d0, float* partial, int64_t tile0, int64_t tile1) {
    const int columns = static_cast<int>(std::min<int64_t>(COLUMNS, C - c));
    if (right.bias)
      kernels().f32.convert(right.bias->dtype, static_cast<const char*>(right.bias->data) + c * itemsize(right.bias->dtype),
                            columns, bias);
    const int64_t d1 = std::min(D, d0 + block), weight_steps = left.product.steps(d1 - d0);
    const bool last = d1 == D;
    const Panel panel{panel_data, weight_steps + (last ? rank_steps : 0), g.width};
    weight(c, d0, d1, panel);
    if (last && r) adapter(c, panel, weight_steps);
    const bool joined = last && !right.dropout;
    for (int64_t i = tile0; i < tile1; i++) {
      const int64_t row = tiles.begin(i);
      const int rows = tiles.rows(i);
      const Strided tile = left.tile(packed, m0, tiles, i, d0), tail = left.tail_of(m0 + row);
      if (last && right.dropout) {
        for (int p = 0; p < columns; p += g.width)
          g.tile(rows, tail, rank_steps, {}, 0, panel.at(p / GROUP, weight_steps),
                 {extra + p, false, true, nullptr, nullptr, nullptr, 0, out_dtype, std::min(g.width, columns - p), false});
        for (int m = 0; m < rows; m++) right.dropout->apply(m0 + row + m, c, columns, extra + m * COLUMNS);
      }
      for (int p = 0; p < columns; p += g.width) {
        char* o = static_cast<char*>(out) + ((m0 + row) * C + c + p) * itemsize(out_dtype);
        g.tile(rows, tile, weight_steps, tail, joined ? rank_steps : 0, panel.at(p / GROUP, 0),
               {partial ? partial + row * COLUMNS + p : nullptr, d0 > 0, !last, right.bias ? bias + p : nullptr,
                last && right.dropout ? extra + p : nullptr, o, C, out_dtype, std::min(g.width, columns - p), accumulate});
      }
    }
  };
  auto strip = [&](int64_t panel, int64_t n, int64_t tile0, int64_t tile1) {
    for (int64_t d0 = 0; d0 < D; d0 += block)
      for (int64_t i = 0; i < n; i++)
        part((panel + i) * COLUMNS, d0, partials ? partials + i * tiles.M * COLUMNS : nullptr, tile0, tile1);
  };
  // As many strips as every thread can have, then as many panels; the rest is shared by rows.
  const int64_t panels = ceil_div(C, COLUMNS), strips = panels / span / team.threads * team.threads, narrow = strips * span;
  const int64_t whole = narrow + (panels - narrow) / team.threads * team.threads;
  team.share(strips + whole - narrow, [&](int64_t i) {
    i < strips ? strip(i * span, span, 0, tiles.count) : strip(narrow + i - strips, 1, 0, tiles.count);
  });
  const int64_t tile0 = tiles.count * team.thread / team.threads, tile1 = tiles.count * (team.thread + 1) / team.threads;
  for (int64_t p = whole; p < panels && tile0 < tile1; p++) strip(p, 1, tile0, tile1);
}

}  // namespace lora_kernels::cpu
