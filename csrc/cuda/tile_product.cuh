// The kernel behind every product in tiles: out = scale * (term_scale * dropout(t factor^T) + bias + left right^T).
//
// The right operand is a dense matrix or the packed weight, which is decoded between device and shared memory while the
// previous tile is multiplied; the adapter's term is where the sums begin, so each result is rounded once.
#pragma once
#include "tile.cuh"

namespace lora_kernels::cuda {

inline constexpr int64_t MAX_PARTIAL_BYTES = int64_t{16} << 20;

// Blocks that share a tile of the result: each leaves its sums in `partial`, the last to arrive adds them in order.
struct Split {
  int parts = 1;
  float* partial = nullptr;  // [tiles, parts, sums of the tile]
  int32_t* counters = nullptr;

  Split() = default;
  // Of `tiles` tiles of `sums` sums, so that each multiprocessor has 16 warps.
  Split(const Context& context, int64_t tiles, int64_t sums, int64_t depth, int threads) : counters(context.counters) {
    constexpr int64_t MIN_DEPTH = 512, MAX_PARTS = 16;
    if (tiles > COUNTERS) return;
    const int64_t bytes = tiles * sums * int64_t{sizeof(float)}, blocks = int64_t{16} * WARP / threads * multiprocessors();
    parts = static_cast<int>(
        std::max<int64_t>(1, std::min({blocks / tiles, depth / MIN_DEPTH, MAX_PARTIAL_BYTES / bytes, MAX_PARTS})));
    if (parts > 1) partial = static_cast<float*>(context.workspace(parts * bytes));
  }
};

// Where sums go: [rows, columns] of T, or float32 that is added to.
struct Output {
  void* data;
  int64_t rows, columns;
  bool accumulate = false;
};

// Whether this block is to store the tile, of which blocks (x, y, *) have computed a part each; `rows` of its rows matter.
template <class S>
__device__ bool add_parts(S& sums, const Split& split, int64_t rows) {
  if (split.parts == 1) return true;
  const int tile = blockIdx.y * gridDim.x + blockIdx.x;
  constexpr int SIZE = S::ROWS * S::COLUMNS;
  float* const first = split.partial + tile * int64_t{SIZE} * split.parts + threadIdx.x;
  // A part is kept as the threads hold it.
  auto each = [&](float* part, auto&& f) {
    int i = 0;
    sums.each([&](int r, int, float* v) {
#pragma unroll
      for (int j = 0; j < S::WIDTH; j++, i++)
        if (r < rows) f(part + i * S::THREADS, v[j]);
    });
  };
  each(first + int64_t{blockIdx.z} * SIZE, [](float* p, float& v) { *p = v, v = 0; });
  __threadfence();
  __syncthreads();
  int* const last = reinterpret_cast<int*>(dynamic_shared());
  if (threadIdx.x == 0) {
    *last = atomicAdd(split.counters + tile, 1) == split.parts - 1;
    if (*last) split.counters[tile] = 0;
  }
  __syncthreads();
  if (!*last) return false;
  __threadfence();
#pragma unroll 1
  for (int part = 0; part < split.parts; part++)
    each(first + int64_t{part} * SIZE, [](const float* p, float& v) { v += __ldcg(p); });
  return true;
}

template <class T, class S>
__device__ void store_sums(S& sums, float scale, const Output& out, int64_t row, int64_t column) {
  sums.each([&](int r, int c, float* v) {
    if (row + r >= out.rows) return;
    const int64_t first = (row + r) * out.columns + column + c;
    if constexpr (S::WIDTH == 2 && sizeof(T) == 2)
      if (!out.accumulate && out.columns % 2 == 0) {
        if (column + c < out.columns) reinterpret_cast<uint32_t*>(out.data)[first / 2] = pack2<T>(scale * v[0], scale * v[1]);
        return;
      }
#pragma unroll
    for (int i = 0; i < S::WIDTH; i++)
      if (column + c + i < out.columns) {
        if (out.accumulate)
          static_cast<float*>(out.data)[first + i] += scale * v[i];
        else
          static_cast<T*>(out.data)[first + i] = from_float<T>(scale * v[i]);
      }
  });
}

template <class Right>
struct Product {
  Matrix left;  // [rows, depth]
  Right right;  // [columns, depth], or [depth, columns] where RIGHT_T
  int64_t depth;
  float scale;
  Matrix t, factor;  // the adapter's term: [rows, r], and stored as `right`; r may be 0
  float term_scale;
  Dropout term_dropout;
  Dense bias;  // [columns]
  Output out;
  Split split;
};

template <class T, int ROWS, int COLUMNS, int WARPS_M, int WARPS_N, class Right>
struct ProductTile {
  using S = Sums<T, ROWS, COLUMNS, WARPS_M, WARPS_N>;
  static constexpr bool PACKED = std::is_same_v<Right, PackedMatrix>;
  static constexpr int THREADS = WARP * WARPS_M * WARPS_N;
  static constexpr int LEFT = ROWS * DEPTH<T>, RIGHT = COLUMNS * DEPTH<T>;  // elements of a tile
  static constexpr int STAGES = PACKED ? 2 : 3;
  static constexpr int SHARED_BYTES = STAGES * (LEFT + RIGHT) * static_cast<int>(sizeof(T));
};

// Blocks (x, y, z): tile x of the rows, tile y of the columns, part z of the depth.  ALIGNED: p.left is direct and p.right
// aligned.
template <class T, int ROWS, int COLUMNS, int WARPS_M, int WARPS_N, class Right, bool RIGHT_T, bool ALIGNED>
__global__ void __launch_bounds__(WARP * WARPS_M * WARPS_N, sizeof(T) == 2 ? BLOCKS_PER_SM : 1)
    product_kernel(const __grid_constant__ Product<Right> p) {
  using Tile = ProductTile<T, ROWS, COLUMNS, WARPS_M, WARPS_N, Right>;
  constexpr int STEP = DEPTH<T>, STAGES = Tile::STAGES, THREADS = Tile::THREADS;
  T* const left = reinterpret_cast<T*>(dynamic_shared());
  T* const right = left + STAGES * Tile::LEFT;
  const int64_t row = blockIdx.x * int64_t{ROWS}, column = blockIdx.y * int64_t{COLUMNS};
  const int64_t steps_each = ceil_div(ceil_div(p.depth, int64_t{STEP}), int64_t{p.split.parts});
  const int64_t begin = blockIdx.z * steps_each * STEP, end = min(p.depth, begin + steps_each * STEP);
  const int steps = end > begin ? static_cast<int>(ceil_div(end - begin, int64_t{STEP})) : 0;

  auto load_dense_tile = [&](T* to, const Matrix& m, int64_t k) {
    if constexpr (RIGHT_T)
      load_tile<T, STEP, COLUMNS, THREADS>(to, m, k, column);
    else
      load_tile<T, COLUMNS, STEP, THREADS>(to, m, column, k);
  };

  typename Tile::S sums;
  if constexpr (Tile::PACKED)
    if (blockIdx.z == 0) {
#pragma unroll 1
      for (int64_t k = 0; k < p.t.columns; k += STEP) {
        load_tile<T, ROWS, STEP, THREADS>(left, p.t, row, k);
        load_dense_tile(right, p.factor, k);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        sums.template multiply<false, RIGHT_T>(left, right);
        __syncthreads();
      }
      float* const bias = reinterpret_cast<float*>(right);
      for (int i = threadIdx.x; i < COLUMNS; i += THREADS)
        bias[i] = p.bias.data && column + i < p.out.columns ? load_dense(p.bias, column + i) : 0.0f;
      uint16_t* const kept = reinterpret_cast<uint16_t*>(left);  // a bit for each element of the tile
      if (p.term_dropout.seed) {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * COLUMNS / 16; i += THREADS)
          kept[i] = static_cast<uint16_t>(
              p.term_dropout.keep((row + i / (COLUMNS / 16)) * p.out.columns + column + i % (COLUMNS / 16) * 16, 16));
      }
      __syncthreads();
      sums.each([&](int r, int c, float* v) {
#pragma unroll
        for (int i = 0; i < Tile::S::WIDTH; i++) {
          v[i] *= p.term_scale;
          if (p.term_dropout.seed && !(kept[(r * COLUMNS + c) / 16] >> (c % 16 + i) & 1)) v[i] = 0;
          v[i] += bias[c + i];
        }
      });
      __syncthreads();
    }

  DirectTiles<T, ROWS, STEP, THREADS> direct(p.left, row, begin);
  auto load = [&](int s) {
    if (s < steps) {
      if constexpr (ALIGNED)
        direct.load(left + s % STAGES * Tile::LEFT);
      else
        load_tile<T, ROWS, STEP, THREADS>(left + s % STAGES * Tile::LEFT, p.left, row, begin + s * STEP);
      if constexpr (!Tile::PACKED) load_dense_tile(right + s % STAGES * Tile::RIGHT, p.right, begin + s * STEP);
    }
    cp_async_commit();
  };
  for (int s = 0; s < STAGES - 1; s++) load(s);
  if constexpr (Tile::PACKED) {
    using Weights = WeightTiles<T, RIGHT_T ? STEP : COLUMNS, RIGHT_T ? COLUMNS : STEP, THREADS, RIGHT_T, ALIGNED>;
    __shared__ float code[16];
    if constexpr (Weights::USES_CODE) {
      if (threadIdx.x < 16) code[threadIdx.x] = p.right.codebook.value[threadIdx.x];
      __syncthreads();
    }
    Weights weight(p.right, code, RIGHT_T ? begin : column, RIGHT_T ? column : begin);
    weight.fetch();
    weight.decode(right);
    weight.fetch();
    for (int s = 0; s < steps; s++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      load(s + STAGES - 1);
      sums.template multiply<false, RIGHT_T>(left + s % STAGES * Tile::LEFT, right + s % 2 * Tile::RIGHT);
      weight.decode(right + (s + 1) % 2 * Tile::RIGHT);
      weight.fetch();
    }
  } else {
    for (int s = 0; s < steps; s++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      load(s + STAGES - 1);
      sums.template multiply<false, RIGHT_T>(left + s % STAGES * Tile::LEFT, right + s % STAGES * Tile::RIGHT);
    }
  }
  if (add_parts(sums, p.split, p.out.rows - row)) store_sums<T>(sums, p.scale, p.out, row, column);
}

template <class T, int ROWS, int COLUMNS, int WARPS_M, int WARPS_N, bool RIGHT_T, bool ALIGNED, class Right>
void run_product(const Context& context, const char* op, Product<Right> p) {
  using Tile = ProductTile<T, ROWS, COLUMNS, WARPS_M, WARPS_N, Right>;
  const int64_t rows = ceil_div(p.out.rows, int64_t{ROWS}), columns = ceil_div(p.out.columns, int64_t{COLUMNS});
  p.split = Split(context, rows * columns, ROWS * COLUMNS, p.depth, Tile::THREADS);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(columns), static_cast<unsigned>(p.split.parts));
  launch(context, op, product_kernel<T, ROWS, COLUMNS, WARPS_M, WARPS_N, Right, RIGHT_T, ALIGNED>, grid, Tile::THREADS,
         Tile::SHARED_BYTES, p);
}

// A product with the weight.
template <class T, bool RIGHT_T>
void run_weight_product(const Context& context, const char* op, const Product<PackedMatrix>& p) {
  if (!p.right.aligned || !is_direct<T>(p.left))
    run_product<T, 32, 64, 1, 4, RIGHT_T, false>(context, op, p);
  else if (p.out.rows <= 32)
    run_product<T, 32, 64, 1, 4, RIGHT_T, true>(context, op, p);
  else
    run_product<T, sizeof(T) == 2 ? 128 : 64, 128, 2, 4, RIGHT_T, true>(context, op, p);
}

// A product with few columns: an adapter's rank.
template <class T, bool RIGHT_T>
void run_narrow_product(const Context& context, const char* op, const Product<Matrix>& p) {
  run_product<T, 64, sizeof(T) == 2 ? 64 : 16, 4, 1, RIGHT_T, false>(context, op, p);
}

}  // namespace lora_kernels::cuda
