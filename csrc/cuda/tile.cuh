// Tiles in shared memory and their products: on the tensor cores for 16-bit elements, with fused multiply-adds for float; sums
// are float32.
#pragma once
#include <algorithm>
#include <cmath>

#include "decode.cuh"

namespace lora_kernels::cuda {

// Elements of K in one product of tiles: rows of 128 bytes.
template <class T>
inline constexpr int DEPTH = 128 / sizeof(T);

// Where a tile with rows of COLUMNS elements keeps (row, column).  The 16-byte vectors of a row are permuted by the row, so
// that the 8 rows that ldmatrix reads at a time lie in different banks.
template <class T, int COLUMNS>
__host__ __device__ constexpr int tile_index(int row, int column) {
  constexpr int SPAN = COLUMNS / VECTOR<T> < 8 ? COLUMNS / VECTOR<T> : 8;
  return row * COLUMNS + (column / VECTOR<T> ^ row * SPAN / 8 % SPAN) * VECTOR<T> + column % VECTOR<T>;
}

// ---- dropout

// Philox 4x32-10 (Salmon et al. 2011) of the counter (low, high, 0, 0).
__device__ inline uint4 philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 10; i++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    const uint32_t h0 = __umulhi(c0, 0xD2511F53), h1 = __umulhi(c2, 0xCD9E8D57);
    const uint32_t l0 = c0 * 0xD2511F53, l1 = c2 * 0xCD9E8D57;
    c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Which elements of a matrix are kept: element i is if word i % 4 of philox(seed, i / 4) is above `last_dropped`.
struct Dropout {
  const int64_t* seed = nullptr;  // null: all are kept
  uint32_t last_dropped = 0;
  float scale = 1;  // of the kept elements

  Dropout() = default;
  explicit Dropout(const Adapter& adapter) {
    const int64_t level = adapter.r ? static_cast<int64_t>(std::nearbyint(adapter.dropout_p * 4294967296.0)) : 0;
    if (level == 0) return;
    seed = adapter.seed;
    last_dropped = static_cast<uint32_t>(level - 1);
    scale = static_cast<float>(1 / (1 - adapter.dropout_p));
  }

  // Bit i: whether element first + i is kept, for i < count <= 16.
  __device__ uint32_t keep(int64_t first, int count) const {
    uint32_t bits = 0;
    const int skip = static_cast<int>(first % 4);
#pragma unroll 1
    for (int i = 0; i < skip + count; i += 4) {
      const uint4 words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(first / 4 + i / 4));
      const uint32_t kept = (words.x > last_dropped) | (words.y > last_dropped) << 1 | (words.z > last_dropped) << 2 |
                            (words.w > last_dropped) << 3;
      bits |= kept << i;
    }
    return bits >> skip;
  }
};

// ---- dense operands

template <class T>
inline constexpr DType DTYPE = std::is_same_v<T, float> ? DType::f32
                               : std::is_same_v<T, f16> ? DType::f16
                                                        : DType::bf16;

// [rows, columns] of any dtype; elements that `dropout` does not keep read as zero, unscaled.
struct Matrix {
  Dense values;
  int64_t rows, columns;
  Dropout dropout;
  bool aligned;  // every row begins on 16 bytes

  Matrix() : values{nullptr, DType::f32}, rows(0), columns(0), aligned(false) {}
  Matrix(Dense values, int64_t rows, int64_t columns, Dropout dropout = {})
      : values(values),
        rows(rows),
        columns(columns),
        dropout(dropout),
        aligned((reinterpret_cast<uintptr_t>(values.data) | static_cast<uintptr_t>(columns * itemsize(values.dtype))) % 16 ==
                0) {}
};

// VECTOR<T> elements of a row, zeros outside of the matrix, into shared memory.
template <class T>
__device__ void copy_vector(T* to, const Matrix& m, int64_t row, int64_t column) {
  constexpr int N = VECTOR<T>;
  float v[N] = {};
  if (row < m.rows && column < m.columns) {
    const int64_t first = row * m.columns + column, n = m.columns - column;
    if (m.values.dtype == DTYPE<T>) {
      load_floats(static_cast<const T*>(m.values.data) + first, v, n);
    } else if (m.values.dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        float quad[4];
        load_floats(static_cast<const float*>(m.values.data) + first + i, quad, n - i);
#pragma unroll
        for (int j = 0; j < 4; j++) v[i + j] = quad[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) v[i] = i < n ? load_dense(m.values, first + i) : 0.0f;
    }
    if (m.dropout.seed) {
      const uint32_t kept = m.dropout.keep(first, N);
#pragma unroll
      for (int i = 0; i < N; i++) v[i] = kept >> i & 1 ? v[i] : 0.0f;
    }
  }
  store_floats(to, v);
}

// Whether rows of m may be copied as they are, 16 bytes at a time.
template <class T>
__host__ __device__ bool is_direct(const Matrix& m) {
  return m.aligned && m.values.dtype == DTYPE<T> && !m.dropout.seed;
}

// One tile [ROWS, COLUMNS] of m after another along its rows, zeros outside; each is complete after cp_async_wait and a
// barrier. m is direct.
template <class T, int ROWS, int COLUMNS, int THREADS>
class DirectTiles {
  static constexpr int VECTORS = COLUMNS / VECTOR<T>, ROW_STEP = THREADS / VECTORS;
  static_assert(ROWS % ROW_STEP == 0);

 public:
  __device__ DirectTiles(const Matrix& m, int64_t row, int64_t column)
      : row_(threadIdx.x / VECTORS),
        column_(threadIdx.x % VECTORS * VECTOR<T>),
        from_(static_cast<const T*>(m.values.data) + (row + row_) * m.columns + column + column_),
        stride_(m.columns * ROW_STEP),
        rows_left_(static_cast<int>(min(int64_t{ROWS}, m.rows - row - row_))),
        columns_left_(static_cast<int>(m.columns - column - column_)) {}

  __device__ __forceinline__ void load(T* tile) {
#pragma unroll
    for (int i = 0; i < ROWS / ROW_STEP; i++)
      cp_async_16(tile + tile_index<T, COLUMNS>(row_ + i * ROW_STEP, column_), from_ + i * stride_,
                  i * ROW_STEP < rows_left_ && columns_left_ > 0);
    from_ += COLUMNS;
    columns_left_ -= COLUMNS;
  }

 private:
  const int row_, column_;
  const T* from_;
  const int64_t stride_;
  const int rows_left_;
  int columns_left_;
};

// Rows row .. row + ROWS and as many COLUMNS of any m into a tile, as above.
template <class T, int ROWS, int COLUMNS, int THREADS>
__device__ __forceinline__ void load_tile(T* tile, const Matrix& m, int64_t row, int64_t column) {
  constexpr int VECTORS = COLUMNS / VECTOR<T>;
  if constexpr (ROWS * VECTORS % THREADS == 0)
    if (is_direct<T>(m)) return DirectTiles<T, ROWS, COLUMNS, THREADS>(m, row, column).load(tile);
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * VECTORS; i += THREADS) {
    const int r = i / VECTORS, c = i % VECTORS * VECTOR<T>;
    copy_vector(tile + tile_index<T, COLUMNS>(r, c), m, row + r, column + c);
  }
}

// ---- the weight as an operand

// W [rows, columns] as a kernel argument.
struct PackedMatrix {
  const uint8_t* packed;
  Scales scales;
  Codebook codebook;
  int64_t rows, columns;
  int shift;     // log2 of the block size
  bool aligned;  // every 32 weights of a row lie in 16 aligned bytes, and in one block

  explicit PackedMatrix(const Weight& w)
      : packed(w.packed),
        scales(w),
        codebook(*w.format),
        rows(w.N),
        columns(w.K),
        shift(w.shift()),
        aligned(w.K % 32 == 0 && reinterpret_cast<uintptr_t>(w.packed) % 16 == 0) {}
};

// A scale on its way from device memory: `fetch` waits for nothing, `value` for code2 only, which is in L1.
class PendingScale {
 public:
  __device__ __forceinline__ void fetch(const Scales& scales, int64_t block) {
    if (scales.absmax) {
      bits_ = __float_as_uint(scales.absmax[block]);
    } else {
      bits_ = scales.absmax_u8[block];
      absmax2_ = scales.absmax2[block >> 8];
    }
  }
  __device__ __forceinline__ float value(const Scales& scales, float offset) const {
    if (scales.absmax) return __uint_as_float(bits_);
    return __fadd_rn(__fmul_rn(__ldg(scales.code2 + bits_), absmax2_), offset);
  }

 private:
  uint32_t bits_ = 0;  // absmax, or the index into code2
  float absmax2_ = 0;
};

// This thread's part of one tile [ROWS, COLUMNS] of W after another, down its columns (DOWN) or along its rows: `fetch` begins
// to load it, `decode` writes it to shared memory.  What is outside of W is finite.  ALIGNED: w.aligned.
template <class T, int ROWS, int COLUMNS, int THREADS, bool DOWN, bool ALIGNED>
class WeightTiles {
  static constexpr int PIECE = ROWS * COLUMNS / THREADS;  // weights of one row
  static_assert(PIECE == 16 || PIECE == 32);

 public:
  // Whether `decode` looks codes up in shared memory.
  static constexpr bool USES_CODE = !ALIGNED || sizeof(T) == 4;

  __device__ WeightTiles(const PackedMatrix& w, const float* code, int64_t row, int64_t column)
      : w_(w),
        code_(code),
        row_(threadIdx.x / (COLUMNS / PIECE)),
        column_(threadIdx.x % (COLUMNS / PIECE) * PIECE),
        offset_(w.scales.absmax ? 0.0f : *w.scales.offset),
        element_((row + row_) * w.columns + column + column_),
        rows_left_(static_cast<int>(w.rows - row - row_)),
        columns_left_(static_cast<int>(w.columns - column - column_)) {}

  __device__ __forceinline__ void fetch() {
    if constexpr (ALIGNED)
      if (rows_left_ > 0 && columns_left_ > 0) {
        const uint8_t* from = w_.packed + element_ / 2;
        if constexpr (PIECE == 32) {
          const uint4 words = load16(from);
          words_[0] = words.x, words_[1] = words.y, words_[2] = words.z, words_[3] = words.w;
        } else {
          const uint2 words = *reinterpret_cast<const uint2*>(from);
          words_[0] = words.x, words_[1] = words.y;
        }
        scale_.fetch(w_.scales, element_ >> w_.shift);
      }
  }

  __device__ __forceinline__ void decode(T* tile) {
    if constexpr (ALIGNED)
      decode_words(tile);
    else
      decode_elements(tile);
    element_ += DOWN ? ROWS * w_.columns : COLUMNS;
    (DOWN ? rows_left_ : columns_left_) -= DOWN ? ROWS : COLUMNS;
  }

 private:
  __device__ __forceinline__ T* at(T* tile, int i) const { return tile + tile_index<T, COLUMNS>(row_, column_ + i); }

  __device__ __forceinline__ void decode_words(T* tile) const {
    const float scale = scale_.value(w_.scales, offset_);
    if constexpr (sizeof(T) == 2) {
      const Table<T> table(w_.codebook, scale);
#pragma unroll
      for (int i = 0; i < PIECE / 8; i++) {
        uint32_t out[4];
        table.decode(words_[i], out);
        store16(at(tile, 8 * i), make_uint4(out[0], out[1], out[2], out[3]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < PIECE; i += 4) {
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = __fmul_rn(code_[nibble(words_[i / 8], (i + j) % 8)], scale);
        store_floats(at(tile, i), v);
      }
    }
  }

  // Any shape: blocks may straddle rows, and rows may begin within a byte.
  __device__ void decode_elements(T* tile) const {
#pragma unroll 1
    for (int i = 0; i < PIECE; i += VECTOR<T>) {
      float v[VECTOR<T>] = {};
#pragma unroll
      for (int j = 0; j < VECTOR<T>; j++)
        if (rows_left_ > 0 && i + j < columns_left_) {
          const int64_t element = element_ + i + j;
          v[j] = __fmul_rn(code_[nibble(w_.packed[element / 2], element % 2)], w_.scales[element >> w_.shift]);
        }
      store_floats(at(tile, i), v);
    }
  }

  const PackedMatrix& w_;
  const float* code_;
  const int row_, column_;
  const float offset_;
  int64_t element_;
  int rows_left_, columns_left_;
  uint32_t words_[PIECE / 8] = {};
  PendingScale scale_;
};

// ---- sums

// ROWS x COLUMNS sums, spread over the threads of WARPS_M x WARPS_N warps, WIDTH neighbours of a row at a time.
template <class T, int ROWS_, int COLUMNS_, int WARPS_M, int WARPS_N>
class TensorSums {
 public:
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, THREADS = WARP * WARPS_M * WARPS_N, WIDTH = 2;

  // += left right^T of two tiles, left [ROWS, depth] or (LEFT_T) [depth, ROWS], right [COLUMNS, depth] or (RIGHT_T)
  // [depth, COLUMNS].
  template <bool LEFT_T, bool RIGHT_T, int depth = DEPTH<T>>
  __device__ __forceinline__ void multiply(const T* left, const T* right) {
    const int lane = threadIdx.x % WARP, low = lane % 8, second = lane / 8 % 2, third = lane / 16;
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[TILES_M][4], b[TILES_N / 2][4];  // b: two tiles of 8 columns
#pragma unroll
      for (int i = 0; i < TILES_M; i++) {
        const int m = row_of_warp() + 16 * i;
        if constexpr (LEFT_T)
          ldmatrix_x4_transposed(a[i], left + tile_index<T, ROWS>(k + 8 * third + low, m + 8 * second));
        else
          ldmatrix_x4(a[i], left + tile_index<T, depth>(m + 8 * second + low, k + 8 * third));
      }
#pragma unroll
      for (int j = 0; j < TILES_N / 2; j++) {
        const int n = column_of_warp() + 16 * j;
        if constexpr (RIGHT_T)
          ldmatrix_x4_transposed(b[j], right + tile_index<T, COLUMNS>(k + 8 * second + low, n + 8 * third));
        else
          ldmatrix_x4(b[j], right + tile_index<T, depth>(n + 8 * third + low, k + 8 * second));
      }
#pragma unroll
      for (int i = 0; i < TILES_M; i++)
#pragma unroll
        for (int j = 0; j < TILES_N; j++) mma_m16n8k16<T>(sums_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // f(row, column, float* sums) for every WIDTH sums of this thread.
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < TILES_M; i++)
#pragma unroll
      for (int j = 0; j < TILES_N; j++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          f(row_of_warp() + 16 * i + 8 * half + lane / 4, column_of_warp() + 8 * j + lane % 4 * 2, sums_[i][j] + 2 * half);
  }

 private:
  static constexpr int TILES_M = ROWS / WARPS_M / 16, TILES_N = COLUMNS / WARPS_N / 8;
  static_assert(TILES_M > 0 && TILES_N > 0 && TILES_N % 2 == 0);

  __device__ static int row_of_warp() { return threadIdx.x / WARP / WARPS_N * (ROWS / WARPS_M); }
  __device__ static int column_of_warp() { return threadIdx.x / WARP % WARPS_N * (COLUMNS / WARPS_N); }

  float sums_[TILES_M][TILES_N][4] = {};
};

// The same without tensor cores.
template <class T, int ROWS_, int COLUMNS_, int WARPS_M, int WARPS_N>
class FmaSums {
 public:
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, THREADS = WARP * WARPS_M * WARPS_N, WIDTH = 1;

  template <bool LEFT_T, bool RIGHT_T, int depth = DEPTH<T>>
  __device__ __forceinline__ void multiply(const T* left, const T* right) {
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      float a[ROWS / ROW_STEP][4];
#pragma unroll
      for (int i = 0; i < ROWS / ROW_STEP; i++) load_four<LEFT_T, ROWS, depth>(left, row(i), k, a[i]);
#pragma unroll
      for (int j = 0; j < COLUMNS / COLUMN_STEP; j++) {
        float b[4];
        load_four<RIGHT_T, COLUMNS, depth>(right, column(j), k, b);
#pragma unroll
        for (int i = 0; i < ROWS / ROW_STEP; i++)  // four products first: a quarter of the roundings meet the large sum
          sums_[i][j] += a[i][0] * b[0] + a[i][1] * b[1] + a[i][2] * b[2] + a[i][3] * b[3];
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(F&& f) {
#pragma unroll
    for (int i = 0; i < ROWS / ROW_STEP; i++)
#pragma unroll
      for (int j = 0; j < COLUMNS / COLUMN_STEP; j++) f(row(i), column(j), &sums_[i][j]);
  }

 private:
  static constexpr int COLUMN_STEP = 16, ROW_STEP = THREADS / COLUMN_STEP;

  // Elements k .. k + 3 along the depth of a tile [SIZE, depth], or (TRANSPOSED) [depth, SIZE].
  template <bool TRANSPOSED, int SIZE, int depth>
  __device__ static void load_four(const T* tile, int i, int k, float (&out)[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      out[j] = to_float(tile[TRANSPOSED ? tile_index<T, SIZE>(k + j, i) : tile_index<T, depth>(i, k) + j]);
  }

  __device__ static int row(int i) { return threadIdx.x / COLUMN_STEP + ROW_STEP * i; }
  __device__ static int column(int j) { return threadIdx.x % COLUMN_STEP + COLUMN_STEP * j; }

  float sums_[ROWS / ROW_STEP][COLUMNS / COLUMN_STEP] = {};
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool BF16_PRODUCTS = false;
#else
inline constexpr bool BF16_PRODUCTS = true;
#endif
// Blocks of 256 threads that a multiprocessor is to hold, of 16-bit tiles: one multiplies while the other decodes.
inline constexpr int BLOCKS_PER_SM = BF16_PRODUCTS ? 2 : 1;
template <class T>
inline constexpr bool TENSOR_CORES = std::is_same_v<T, f16> || (std::is_same_v<T, bf16> && BF16_PRODUCTS);

template <class T, int ROWS, int COLUMNS, int WARPS_M, int WARPS_N>
using Sums = std::conditional_t<TENSOR_CORES<T>, TensorSums<T, ROWS, COLUMNS, WARPS_M, WARPS_N>,
                                FmaSums<T, ROWS, COLUMNS, WARPS_M, WARPS_N>>;

}  // namespace lora_kernels::cuda
