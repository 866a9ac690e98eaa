// y = x W^T + s h B^T + bias,  h = dropout(x) A^T.  h is one launch, y another:
//   up to 64 rows of x  the packed weight goes from device memory straight into the fragments of the tensor cores
//   otherwise           tiles (tile_product.cuh): the weight is decoded once per 128 rows of x
#include "tile_product.cuh"

namespace lora_kernels::cuda {

namespace {

constexpr int SMALL_ROWS = 64;                          // of x, at most, for the first kernel
constexpr int SMALL_OUTPUTS = 64, SMALL_THREADS = 128;  // of a block

struct SmallLinear {
  Matrix x, h, B;
  PackedMatrix weight;
  float scaling;
  Dense bias;
  Output y;
  Split split;
};

// Elements column .. column + 3 of a row: a lane's part of a fragment 16 deep.
template <class T>
__device__ uint2 load_four(const Matrix& m, int64_t row, int64_t column) {
  float v[4] = {};
  if (row < m.rows)
    for (int i = 0; i < 4; i++)
      if (column + i < m.columns) v[i] = load_dense(m.values, row * m.columns + column + i);
  return make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
}

// y transposed, a warp's 16 outputs of TILES * 8 rows.
template <int TILES>
struct SmallSums {
  static constexpr int ROWS = 8 * TILES, COLUMNS = SMALL_OUTPUTS, THREADS = SMALL_THREADS, WIDTH = 1;
  float sums[TILES][4] = {};

  template <class F>
  __device__ __forceinline__ void each(F&& f) {
    const int lane = threadIdx.x % WARP, output = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) f(8 * i + lane % 4 * 2 + j % 2, output + j / 2 * 8, &sums[i][j]);
  }
};

// Weights of one block that a lane takes in turn: the more, the fewer tables it builds, and the more shared memory x takes.
template <int TILES>
constexpr int SMALL_PIECE = TILES <= 2 ? 64 : 32;

// The weight is the left operand, 16 outputs a warp; x the right one, TILES * 8 rows.  A product does not depend on the order
// of K as long as both operands follow the same: lane t of a row's four takes PIECE consecutive weights, 16 bytes a load, as
// its part of one fragment after another, and the same elements of x.
template <class T, int TILES>
__global__ void __launch_bounds__(SMALL_THREADS, TILES == 8 ? 3 : 4) small_kernel(const __grid_constant__ SmallLinear p) {
  if constexpr (TENSOR_CORES<T>) {
    constexpr int ROWS = 8 * TILES, PIECE = SMALL_PIECE<TILES>, LOADS = PIECE / 32, STEP = 4 * PIECE;
    T* const tiles = reinterpret_cast<T*>(dynamic_shared());
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    // Lanes begin with different loads and halves of them, so that eight at a time read x from different banks.
    const int first_load = LOADS == 2 ? t / 2 : 0;
    const bool swap = LOADS == 2 ? t % 2 : t / 2;
    const int64_t K = p.weight.columns, first = blockIdx.y * int64_t{SMALL_OUTPUTS};
    const int64_t output = first + threadIdx.x / WARP * 16 + g;  // and output + 8
    const int64_t each = round_up(ceil_div(K, int64_t{p.split.parts}), int64_t{STEP});
    const int64_t begin = blockIdx.z * each, end = min(K, begin + each);

    const float offset = p.weight.scales.absmax ? 0.0f : *p.weight.scales.offset;
    int64_t element = output * K + begin + PIECE * t;  // of the next weights
    int left = static_cast<int>(end - begin) - PIECE * t;
    uint4 next[2][LOADS] = {};
    PendingScale scales[2];
    auto fetch = [&] {
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (output + 8 * i < p.weight.rows && left > 0) {
          const int64_t at = element + 8 * i * K;
#pragma unroll
          for (int j = 0; j < LOADS; j++) next[i][j] = load16_once(p.weight.packed + at / 2 + 16 * (j ^ first_load));
          scales[i].fetch(p.weight.scales, at >> p.weight.shift);
        }
      element += STEP;
      left -= STEP;
    };
    DirectTiles<T, ROWS, STEP, SMALL_THREADS> x(p.x, 0, begin);
    auto load_x = [&](int64_t k) {
      if (k < end) x.load(tiles + k / STEP % 2 * ROWS * STEP);
      cp_async_commit();
    };
    fetch();
    load_x(begin);

    SmallSums<TILES> acc;
    if (blockIdx.z == 0) {
#pragma unroll 1
      for (int64_t k = 0; k < p.h.columns; k += 16) {
        const uint2 b0 = load_four<T>(p.B, output, k + 4 * t), b1 = load_four<T>(p.B, output + 8, k + 4 * t);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          const uint2 h = load_four<T>(p.h, 8 * i + g, k + 4 * t);
          mma_m16n8k16<T>(acc.sums[i], {b0.x, b1.x, b0.y, b1.y}, h.x, h.y);
        }
      }
      float bias[2] = {};
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (p.bias.data && output + 8 * i < p.y.columns) bias[i] = load_dense(p.bias, output + 8 * i);
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc.sums[i][j] = p.scaling * acc.sums[i][j] + bias[j / 2];
    }

    for (int64_t k = begin; k < end; k += STEP) {
      uint32_t words[2][LOADS][4];
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
          const uint4 w = next[i][j];
          words[i][j][0] = swap ? w.z : w.x, words[i][j][1] = swap ? w.w : w.y;
          words[i][j][2] = swap ? w.x : w.z, words[i][j][3] = swap ? w.y : w.w;
        }
      const Table<T> tables[2] = {{p.weight.codebook, scales[0].value(p.weight.scales, offset)},
                                  {p.weight.codebook, scales[1].value(p.weight.scales, offset)}};
      cp_async_wait<0>();
      __syncthreads();
      load_x(k + STEP);
      fetch();
      const T* const tile = tiles + k / STEP % 2 * ROWS * STEP;
#pragma unroll
      for (int i = 0; i < 4 * LOADS; i++) {
        const int at = PIECE * t + 32 * (i / 4 ^ first_load) + 8 * (i % 4 ^ 2 * swap);
        uint32_t w[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++) tables[j].decode(words[j][i / 4][i % 4], w[j]);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const uint4 b = load16(tile + tile_index<T, STEP>(8 * m + g, at));
          mma_m16n8k16<T>(acc.sums[m], {w[0][0], w[1][0], w[0][1], w[1][1]}, b.x, b.y);
          mma_m16n8k16<T>(acc.sums[m], {w[0][2], w[1][2], w[0][3], w[1][3]}, b.z, b.w);
        }
      }
    }
    if (add_parts(acc, p.split, p.y.rows)) store_sums<T>(acc, 1.0f, p.y, 0, first);
  }
}

template <class T, int TILES>
void run_small(const Context& context, SmallLinear p) {
  const int64_t blocks = ceil_div(p.y.columns, int64_t{SMALL_OUTPUTS});
  p.split = Split(context, blocks, 8 * TILES * SMALL_OUTPUTS, p.weight.columns, SMALL_THREADS);
  const dim3 grid(1, static_cast<unsigned>(blocks), static_cast<unsigned>(p.split.parts));
  launch(context, "qlora_linear", small_kernel<T, TILES>, grid, SMALL_THREADS,
         2 * (8 * TILES) * (4 * SMALL_PIECE<TILES>)*sizeof(T), p);
}

// Whether small_kernel takes x: a lane's weights are of one block, and all its loads 16 bytes.
template <class T>
bool takes_small(const Matrix& x, const Weight& weight) {
  return x.rows <= SMALL_ROWS && weight.K % 64 == 0 && weight.blocksize >= 64 && PackedMatrix(weight).aligned &&
         is_direct<T>(x) && compute_capability() >= (std::is_same_v<T, f16> ? 75 : 80);
}

template <class T>
void linear(const Context& context, int64_t M, const void* x, const Weight& weight, const Adapter& adapter, Dense bias, void* y,
            void* h, bool product) {
  const int64_t N = weight.N, K = weight.K, r = adapter.r;
  const Matrix x_matrix({x, DTYPE<T>}, M, K), h_matrix({h, DTYPE<T>}, M, r), A(adapter.A, r, K), B(adapter.B, N, r);
  if (r) {
    const Dropout dropout(adapter);
    Product<Matrix> p{};
    p.left = Matrix({x, DTYPE<T>}, M, K, dropout), p.right = A, p.depth = K, p.scale = dropout.scale, p.out = {h, M, r};
    run_narrow_product<T, false>(context, "qlora_linear (h)", p);
  }
  const PackedMatrix W(weight);
  if constexpr (sizeof(T) == 2)
    if (product && takes_small<T>(x_matrix, weight)) {
      const SmallLinear p{x_matrix, h_matrix, B, W, adapter.scaling, bias, {y, M, N}, {}};
      if (M <= 8) return run_small<T, 1>(context, p);
      if (M <= 16) return run_small<T, 2>(context, p);
      if (M <= 32) return run_small<T, 4>(context, p);
      return run_small<T, 8>(context, p);
    }
  Product<PackedMatrix> p{x_matrix, W, product ? K : 0, 1, h_matrix, B, adapter.scaling, {}, bias, {y, M, N}, {}};
  run_weight_product<T, false>(context, "qlora_linear", p);
}

}  // namespace

void qlora_linear(const Context& context, DType dtype, int64_t M, const void* x, const Weight& weight, const Adapter& adapter,
                  Dense bias, void* y, void* h, bool product) {
  if (M == 0) return;
  dispatch(dtype,
           [&](auto type) { linear<typename decltype(type)::type>(context, M, x, weight, adapter, bias, y, h, product); });
}

}  // namespace lora_kernels::cuda
