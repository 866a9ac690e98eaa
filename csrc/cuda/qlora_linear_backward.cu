// With g = dy B:  dx = dy W + dropout(s g A),  dA = s g^T dropout(x),  dB = s dy^T h,  dbias = sum of dy over its rows.
//
// g, dB and dbias come from one read of dy, dA from one read of x; the sums of the blocks are added in a fixed order.
#include "tile_product.cuh"

namespace lora_kernels::cuda {

namespace {

// What one read of x [rows, columns] gives: with factor [columns, r], x factor; with t [rows, r], dropout(x)^T t; and the sum
// of the rows of x.  Each is a list of float32 partial sums; null: not wanted.
struct Read {
  Matrix x, factor, t;
  int64_t r;
  int tiles;        // of rows, that a block reads in turn
  float* products;  // [column tiles, rows, r]
  float* gradient;  // [row ranges, columns, r], or [row ranges, r, columns] if by_rank
  bool by_rank;
  float* totals;  // [row ranges, columns]
};

template <class T>
struct ReadTile {
  static constexpr int ROWS = 64, COLUMNS = 256 / sizeof(T), RANKS = sizeof(T) == 2 ? 64 : 16, THREADS = 256;
  static constexpr int X = ROWS * COLUMNS, TERM = ROWS * RANKS, FACTOR = COLUMNS * RANKS;  // elements
  static constexpr int SHARED_BYTES = (2 * X + 2 * TERM + FACTOR) * static_cast<int>(sizeof(T));
};

// Blocks (x, y, z): row range x, column tile y, RANKS of r from z * RANKS.
template <class T>
__global__ void __launch_bounds__(ReadTile<T>::THREADS, BLOCKS_PER_SM) read_kernel(const __grid_constant__ Read p) {
  using Tile = ReadTile<T>;
  constexpr int ROWS = Tile::ROWS, COLUMNS = Tile::COLUMNS, RANKS = Tile::RANKS, THREADS = Tile::THREADS;
  T* const x = reinterpret_cast<T*>(dynamic_shared());
  T* const t = x + 2 * Tile::X;
  T* const factor = t + 2 * Tile::TERM;
  const int64_t column = blockIdx.y * int64_t{COLUMNS}, rank = blockIdx.z * int64_t{RANKS};
  const int64_t begin = blockIdx.x * int64_t{ROWS} * p.tiles;
  const int tiles = static_cast<int>(min(int64_t{p.tiles}, ceil_div(p.x.rows - begin, int64_t{ROWS})));

  auto load = [&](int i) {
    if (i < tiles) {
      load_tile<T, ROWS, COLUMNS, THREADS>(x + i % 2 * Tile::X, p.x, begin + i * ROWS, column);
      if (p.gradient) load_tile<T, ROWS, RANKS, THREADS>(t + i % 2 * Tile::TERM, p.t, begin + i * ROWS, rank);
    }
    cp_async_commit();
  };
  load(0);
  if (p.products) load_tile<T, COLUMNS, RANKS, THREADS>(factor, p.factor, column, rank);
  cp_async_commit();

  Sums<T, COLUMNS, RANKS, 4, 2> gradient;
  float total = 0;
  for (int i = 0; i < tiles; i++) {
    cp_async_wait<0>();
    __syncthreads();
    load(i + 1);
    const T* const tile = x + i % 2 * Tile::X;
    if (p.gradient) gradient.template multiply<true, true, ROWS>(tile, t + i % 2 * Tile::TERM);
    if (p.products) {
      Sums<T, ROWS, RANKS, 4, 2> product;
      product.template multiply<false, true, COLUMNS>(tile, factor);
      product.each([&](int m, int q, float* v) {
        const int64_t row = begin + i * ROWS + m;
#pragma unroll
        for (int j = 0; j < product.WIDTH; j++)
          if (row < p.x.rows && rank + q + j < p.r) p.products[(blockIdx.y * p.x.rows + row) * p.r + rank + q + j] = v[j];
      });
    }
    if (p.totals && blockIdx.z == 0 && threadIdx.x < COLUMNS)
      for (int m = 0; m < ROWS; m++) total += to_float(tile[tile_index<T, COLUMNS>(m, threadIdx.x)]);
  }
  if (p.gradient)
    gradient.each([&](int c, int q, float* v) {
#pragma unroll
      for (int j = 0; j < gradient.WIDTH; j++) {
        const int64_t place = p.by_rank ? (rank + q + j) * p.x.columns + column + c : (column + c) * p.r + rank + q + j;
        if (column + c < p.x.columns && rank + q + j < p.r) p.gradient[blockIdx.x * p.x.columns * p.r + place] = v[j];
      }
    });
  if (p.totals && blockIdx.z == 0 && threadIdx.x < COLUMNS && column + threadIdx.x < p.x.columns)
    p.totals[blockIdx.x * p.x.columns + column + threadIdx.x] = total;
}

// out [count] = scale * the sum of n partials, in order.
struct Reduction {
  const float* partials;
  int64_t n, count;
  float scale;
  DType dtype;
  void* out;
};

struct Reductions {
  static constexpr int MOST = 3;
  Reduction each[MOST];
  int n = 0;
  void add(const Reduction& r) { each[n++] = r; }
};

// Blocks (x, y): 256 elements of reduction y.
__global__ void __launch_bounds__(256) reduce_kernel(const __grid_constant__ Reductions reductions) {
  const Reduction& r = reductions.each[blockIdx.y];
  const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x;
  if (i >= r.count) return;
  float sum = 0;
  for (int64_t p = 0; p < r.n; p++) sum += r.partials[p * r.count + i];
  sum *= r.scale;
  if (r.dtype == DType::f32)
    static_cast<float*>(r.out)[i] = sum;
  else if (r.dtype == DType::f16)
    static_cast<f16*>(r.out)[i] = from_float<f16>(sum);
  else
    static_cast<bf16*>(r.out)[i] = from_float<bf16>(sum);
}

// A gradient of the adapter: [columns, r], or [r, columns] if by_rank.
struct Gradient {
  void* out;  // null: not wanted
  DType dtype;
  float scale;
  bool by_rank;
};

// One read of x: fills `product` [rows, r] of T, `gradient` and `total` [columns], where they are not null.
template <class T>
void read(const Context& context, const Matrix& x, int64_t r, const Matrix& factor, void* product, const Matrix& t,
          const Gradient& gradient, float* total) {
  using Tile = ReadTile<T>;
  const int64_t row_tiles = ceil_div(x.rows, int64_t{Tile::ROWS}), column_tiles = ceil_div(x.columns, int64_t{Tile::COLUMNS});
  const int64_t rank_tiles = std::max<int64_t>(1, ceil_div(r, int64_t{Tile::RANKS}));
  // Few ranges of rows, for there are as many partial gradients, but blocks for every multiprocessor.
  const int64_t most = std::max<int64_t>(1, MAX_PARTIAL_BYTES / (x.columns * std::max<int64_t>(r, 1) * int64_t{sizeof(float)}));
  const int64_t enough = ceil_div(int64_t{2 * multiprocessors()}, column_tiles * rank_tiles);
  const int64_t tiles = std::max<int64_t>(1, ceil_div(row_tiles, std::min(most, enough)));
  const int64_t ranges = ceil_div(row_tiles, tiles);

  Read p{x, factor, t, r, static_cast<int>(tiles), nullptr, nullptr, gradient.by_rank, nullptr};
  Reductions reductions;
  int64_t longest = 0;
  auto want = [&](float*& partial, int64_t n, int64_t count, float scale, DType dtype, void* out) {
    if (!out) return;
    if (n) partial = static_cast<float*>(context.workspace(n * count * int64_t{sizeof(float)}));
    reductions.add({partial, n, count, scale, dtype, out});
    longest = std::max(longest, count);
  };
  want(p.products, column_tiles, x.rows * r, 1, DTYPE<T>, product);
  want(p.gradient, ranges, x.columns * r, gradient.scale, gradient.dtype, gradient.out);
  want(p.totals, ranges, x.columns, 1, DType::f32, total);
  if (reductions.n == 0) return;
  const dim3 grid(static_cast<unsigned>(ranges), static_cast<unsigned>(column_tiles), static_cast<unsigned>(rank_tiles));
  launch(context, "qlora_linear_backward (read)", read_kernel<T>, grid, Tile::THREADS, Tile::SHARED_BYTES, p);
  launch(context, "qlora_linear_backward (reduce)", reduce_kernel,
         dim3(static_cast<unsigned>(ceil_div(longest, int64_t{256})), static_cast<unsigned>(reductions.n)), 256, 0, reductions);
}

template <class T>
void backward(const Context& context, int64_t M, const void* dy, const void* x, const void* h, const Weight& weight,
              const Adapter& adapter, bool accumulate_dx, void* dx, void* dA, void* dB, float* dbias, bool product) {
  const int64_t N = weight.N, K = weight.K, r = adapter.r;
  const Dropout dropout(adapter);
  const Matrix dy_matrix({dy, DTYPE<T>}, M, N), A(adapter.A, r, K), B(adapter.B, N, r);
  const float dropped_scale = adapter.scaling * dropout.scale;
  void* g = r && (dx || dA) ? context.workspace(M * r * int64_t{sizeof(T)}) : nullptr;
  const Matrix g_matrix({g, DTYPE<T>}, M, g ? r : 0);

  // Where g would take many partial sums, a second read of dy costs less.
  const bool apart = g && ceil_div(N, int64_t{ReadTile<T>::COLUMNS}) * M * r * int64_t{sizeof(float)} > MAX_PARTIAL_BYTES;
  if (apart) {
    Product<Matrix> p{};
    p.left = dy_matrix, p.right = B, p.depth = N, p.scale = 1, p.out = {g, M, r};
    run_narrow_product<T, true>(context, "qlora_linear_backward (g)", p);
  }
  read<T>(context, dy_matrix, r, B, apart ? nullptr : g, {{h, DTYPE<T>}, M, r}, {dB, adapter.B.dtype, adapter.scaling, false},
          dbias);
  if (dA)
    read<T>(context, {{x, DTYPE<T>}, M, K, dropout}, r, {}, nullptr, g_matrix, {dA, adapter.A.dtype, dropped_scale, true},
            nullptr);
  if (dx) {
    const Product<PackedMatrix> p{dy_matrix, PackedMatrix(weight),  product ? N : 0,           1, g_matrix, A, dropped_scale,
                                  dropout,   {nullptr, DType::f32}, {dx, M, K, accumulate_dx}, {}};
    run_weight_product<T, true>(context, "qlora_linear_backward (dx)", p);
  }
}

}  // namespace

void qlora_linear_backward(const Context& context, DType dtype, int64_t M, const void* dy, const void* x, const void* h,
                           const Weight& weight, const Adapter& adapter, bool accumulate_dx, void* dx, void* dA, void* dB,
                           float* dbias, bool product) {
  dispatch(dtype, [&](auto type) {
    backward<typename decltype(type)::type>(context, M, dy, x, h, weight, adapter, accumulate_dx, dx, dA, dB, dbias, product);
  });
}

}  // namespace lora_kernels::cuda
