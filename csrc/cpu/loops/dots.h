// The product of a few rows of x with rows of W that are decoded as they come, over a struct S that says how a level decodes:
//   S::Math, S::Value                 how it multiplies (tiles.h), and what; of Math also:
//   Math::DIRECT                      rows of x up to which W is decoded in registers only, again for each tile
//   Math::DOTS                        rows of x up to which this is faster than the packed product
//   Math::NR                          rows of W in a tile
//   Math::fma, Math::sum_each         a b + c; the sums of NR vectors, in the first NR lanes
//   S::STEP                           weights that a table serves, 64 or 128: the last step of a row may be half
//   S::SPAN, S::WAYS                  weights that WAYS vectors hold: the i-th every WAYS-th of them, from the i-th on
//   S::Code(codebook), S::table(code, absmax of 64 weights, of the next 64)
//   S::decode<HALF>(packed, table, i) the i-th of these vectors
#pragma once
#include "tiles.h"

namespace lora_kernels::cpu {
namespace {

constexpr int TILE = 4;             // rows of x in a tile
constexpr int DECODED = 8;          // rows of W decoded at a time for more, BLOCK of their columns: these stay in L1
constexpr int BLOCK = 640;          // at most
constexpr int64_t FETCH = 4 << 10;  // bytes of W ahead, beside the rows that are taken together

// Columns decoded at a time: a whole number of steps, of float32 no more than may be summed at once.
template <class Math>
int64_t block_of(int64_t K) {
  constexpr int64_t MOST = Math::VALUES == 1 && F32_BLOCK * Math::LANES < BLOCK ? F32_BLOCK * Math::LANES : BLOCK;
  const int64_t blocks = (K + MOST - 1) / MOST;
  return ((K + blocks - 1) / blocks + 127) / 128 * 128;
}

// Rows of x: `step` values of row m from x + m * row on, the next ones step_to_step further.
template <class Value>
struct Steps {
  const Value* x;
  int64_t row, step, step_to_step;
};

// totals [rows, M, LANES] = or += rows of `right` [rows, BLOCK] by rows of x, `length` values of each.
template <class Math, int MR, class Value>
inline void dot_tile(const Steps<Value>& x, int m0, const Value* right, int64_t length, bool first, float* totals, int M) {
  constexpr int L = Math::LANES, NR = Math::NR, LENGTH = L * Math::VALUES;
  typename Math::F sums[NR][MR];
#pragma GCC unroll 4
  for (int j = 0; j < NR; j++)
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) sums[j][m] = Math::zero();
  const Value* v = x.x + m0 * x.row;
  for (int64_t k = 0; k < length; v += x.step_to_step)
    for (int64_t i = 0; i < x.step && k < length; i += LENGTH, k += LENGTH) {
      typename Math::W w[NR];
#pragma GCC unroll 4
      for (int j = 0; j < NR; j++) w[j] = Math::right(reinterpret_cast<const uint32_t*>(right + j * BLOCK + k));
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) {
        const typename Math::X value = Math::right(reinterpret_cast<const uint32_t*>(v + m * x.row + i));
#pragma GCC unroll 4
        for (int j = 0; j < NR; j++) sums[j][m] = Math::dot(sums[j][m], value, w[j]);
      }
    }
#pragma GCC unroll 4
  for (int j = 0; j < NR; j++)
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) {
      float* t = totals + (j * M + m0 + m) * L;
      Math::store_f32(t, first ? sums[j][m] : Math::add(Math::load_f32(t), sums[j][m]));
    }
}

// All rows of x; `rows` of `right`, a multiple of NR.
template <class Math, class Value>
void dot_block(const Steps<Value>& x, int M, const Value* right, int rows, int64_t length, bool first, float* totals) {
  constexpr int L = Math::LANES, NR = Math::NR;
  for (int m = 0; m < M; m += TILE)
    for (int j = 0; j < rows; j += NR) {
      const Value* w = right + j * BLOCK;
      float* t = totals + j * M * L;
      switch (M - m) {
        case 1:
          dot_tile<Math, 1>(x, m, w, length, first, t, M);
          break;
        case 2:
          dot_tile<Math, 2>(x, m, w, length, first, t, M);
          break;
        case 3:
          dot_tile<Math, 3>(x, m, w, length, first, t, M);
          break;
        default:
          dot_tile<Math, 4>(x, m, w, length, first, t, M);
      }
    }
}

template <class S>
class DotRows {
  using Math = typename S::Math;
  using F = typename Math::F;
  using Value = typename S::Value;
  static constexpr int L = Math::LANES, NR = Math::NR, STEP = S::STEP, SPAN = S::SPAN, WAYS = S::WAYS;
  template <bool V>
  struct Bool {
    static constexpr bool value = V;
  };

 public:
  DotRows(const Dots& d, int64_t n0, int64_t n1) : d_(d), code_(d.codebook), n0_(n0), n1_(n1) {}

  void run() {
    if (d_.M > Math::DIRECT) return buffered();
    for (int64_t n = n0_; n < n1_; n += NR)
      for (int m = 0; m < d_.M; m += TILE) {
        switch (d_.M - m) {
          case 1:
            direct<1>(n, m);
            break;
          case 2:
            direct<2>(n, m);
            break;
          case 3:
            direct<3>(n, m);
            break;
          default:
            direct<4>(n, m);
        }
      }
  }

 private:
  // A row of W that exists: past the last one, that again.
  int64_t row(int64_t n) const { return n < n1_ ? n : n1_ - 1; }
  const uint8_t* codes(int64_t n) const { return d_.packed + n * d_.K / 2; }
  const float* scales(int64_t n) const { return d_.absmax + (n - n0_) * (d_.K / 64); }
  // What is fetched while rows [n, n + rows) are taken, line by line in the order of addresses, whatever that of the rows: the
  // threads' single streams come out of a busy memory faster than one for each row.  Not past the end of W.
  const uint8_t* ahead(int64_t n, int rows) const {
    const int64_t bytes = rows * d_.K / 2;
    return codes(n) + (codes(n) + 2 * bytes + FETCH <= d_.end ? bytes + FETCH : 0);
  }

  static int64_t padded(int64_t k) { return (k + STEP - 1) / STEP * STEP; }
  template <class Half>
  typename S::Table table(const float* scale, int64_t k, Half half) const {
    return S::table(code_, scale[k / 64], scale[STEP == 64 || half.value ? k / 64 : k / 64 + 1]);
  }

  // Rows n .. n + NR of W by rows m0 .. m0 + MR of x.
  template <int MR>
  void direct(int64_t n, int m0) const {
    const Value* x = static_cast<const Value*>(d_.x) + m0 * STEP;
    F totals[NR][MR], sums[NR][MR];
    F odds[NR];  // of one row of x, the sums of odd elements are kept apart: they would wait for each other
    const uint8_t* packed[NR];
    const float* scale[NR];
    const uint8_t* fetched = ahead(n, NR);
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) {
      packed[j] = codes(row(n + j));
      scale[j] = scales(row(n + j));
      odds[j] = Math::zero();
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) sums[j][m] = totals[j][m] = Math::zero();
    }
    // Of float32, a chunk is summed apart: the error of a sum grows with the square root of its length.
    constexpr bool CHUNKS = Math::VALUES == 1;
    auto step = [&](int64_t k, auto half) __attribute__((always_inline)) {
      typename S::Table tables[NR];
#pragma GCC unroll 4
      for (int j = 0; j < NR; j++) {
        tables[j] = table(scale[j], k, half);
        if (STEP == 128 || !(k & 64)) __builtin_prefetch(fetched + NR * (k / 2) + 64 * j);
      }
#pragma GCC unroll 8
      for (int i = 0; i < STEP; i += SPAN)
#pragma GCC unroll 4
        for (int way = 0; way < WAYS; way++) {
          typename Math::X v[MR];
#pragma GCC unroll 4
          for (int m = 0; m < MR; m++) v[m] = load(x + k * d_.M + m * STEP + i + way * (SPAN / WAYS));
#pragma GCC unroll 4
          for (int j = 0; j < NR; j++) {
            const typename Math::W w = S::template decode<half.value>(packed[j] + (k + i) / 2, tables[j], way);
#pragma GCC unroll 4
            for (int m = 0; m < MR; m++) {
              F& sum = MR == 1 && way % 2 ? odds[j] : sums[j][m];
              sum = Math::dot(sum, v[m], w);
            }
          }
        }
    };
    int64_t k = 0;
    for (; k + STEP <= d_.K; k += STEP) {
      if (CHUNKS && k > 0 && k % (F32_BLOCK * L) == 0) {
#pragma GCC unroll 4
        for (int j = 0; j < NR; j++)
#pragma GCC unroll 4
          for (int m = 0; m < MR; m++) {
            totals[j][m] = Math::add(totals[j][m], sums[j][m]);
            sums[j][m] = Math::zero();
            if (MR > 1) continue;
            totals[j][m] = Math::add(totals[j][m], odds[j]);
            odds[j] = Math::zero();
          }
      }
      step(k, Bool<false>());
    }
    if (k < d_.K) step(k, Bool<true>());
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) {
      F s[NR];
#pragma GCC unroll 4
      for (int j = 0; j < NR; j++) {
        s[j] = CHUNKS ? Math::add(totals[j][m], sums[j][m]) : sums[j][m];
        if (MR == 1) s[j] = Math::add(s[j], odds[j]);
      }
      finish(n, m0 + m, s);
    }
  }

  void buffered() {
    alignas(64) Value decoded[DECODED * BLOCK];
    alignas(64) float totals[DECODED * MAX_DOTS * L];
    const Value* x = static_cast<const Value*>(d_.x);
    const int64_t block = block_of<Math>(d_.K);
    for (int64_t n = n0_; n < n1_; n += DECODED) {
      const int rows = static_cast<int>(n1_ - n < DECODED ? (n1_ - n + NR - 1) / NR * NR : DECODED);
      const uint8_t* fetched = ahead(n, rows);
      for (int64_t k = 0; k < d_.K; k += block) {
        const int64_t length = d_.K - k < block ? d_.K - k : block;
        for (int j = 0; j < rows; j++, fetched += length / 2) decode(row(n + j), k, length, fetched, decoded + j * BLOCK);
        dot_block<Math>(Steps<Value>{x + k * d_.M, STEP, STEP, STEP * d_.M}, d_.M, decoded, rows, padded(length), k == 0,
                        totals);
      }
      for (int j = 0; j < rows; j += NR)
        for (int m = 0; m < d_.M; m++) {
          F s[NR];
#pragma GCC unroll 4
          for (int i = 0; i < NR; i++) s[i] = Math::load_f32(totals + ((j + i) * d_.M + m) * L);
          finish(n + j, m, s);
        }
    }
  }

  void decode(int64_t n, int64_t k0, int64_t length, const uint8_t* fetched, Value* out) const {
    const float* scale = scales(n);
    auto step = [&](int64_t k, auto half) {
      const uint8_t* p = codes(n) + k / 2;
      if (STEP == 128 || !(k & 64)) __builtin_prefetch(fetched + (k - k0) / 2);
      const typename S::Table t = table(scale, k, half);
#pragma GCC unroll 8
      for (int i = 0; i < STEP; i += SPAN)
#pragma GCC unroll 4
        for (int way = 0; way < WAYS; way++, out += SPAN / WAYS) {
          const typename Math::W w = S::template decode<half.value>(p + i / 2, t, way);
          __builtin_memcpy(out, &w, sizeof w);
        }
    };
    int64_t k = k0;
    for (; k + STEP <= k0 + length; k += STEP) step(k, Bool<false>());
    if (k < k0 + length) step(k, Bool<true>());
  }

  // The sums of rows n .. n + NR of W with row m of x, the adapter and the bias -> y.
  inline __attribute__((always_inline)) void finish(int64_t n, int m, F (&s)[NR]) const {
    for (int64_t q = 0; q < d_.rank; q += L) {
      const F h = Math::load_f32(d_.h + m * d_.rank + q);
#pragma GCC unroll 4
      for (int j = 0; j < NR; j++) s[j] = Math::fma(Math::load_f32(d_.B + (row(n + j) - n0_) * d_.rank + q), h, s[j]);
    }
    const int rows = static_cast<int>(n1_ - n < NR ? n1_ - n : NR);
    F out = Math::sum_each(s);
    if (d_.bias) out = Math::add(out, Math::load_some(d_.bias + n - n0_, rows));
    store<Math>(d_.dtype, d_.y, m * d_.N + n, out, rows);
  }

  static typename Math::X load(const Value* p) { return Math::right(reinterpret_cast<const uint32_t*>(p)); }

  const Dots& d_;
  const typename S::Code code_;
  const int64_t n0_, n1_;
};

template <class S>
void dots(const Dots& d, int64_t n0, int64_t n1) {
  DotRows<S>(d, n0, n1).run();
}

// A row of x as the weights come, padded with zeros to whole steps.
template <class S>
void split(const void* x, int64_t n, void* dst, int64_t step_to_step) {
  using T = typename S::Value;
  const T* s = static_cast<const T*>(x);
  T* d = static_cast<T*>(dst);
  constexpr int EACH = S::SPAN / S::WAYS;
  for (int64_t i = 0; i < n; i += S::STEP, d += step_to_step)
    for (int k = 0; k < S::STEP; k += S::SPAN)
      for (int way = 0; way < S::WAYS; way++)
        for (int j = 0; j < EACH; j++) {
          const int64_t from = i + k + S::WAYS * j + way;
          d[k + way * EACH + j] = from < n ? s[from] : T{0};
        }
}

template <class Math, class Value, void (*convert)(DType, const void*, int64_t, void*)>
void rank_dots(const void* x_, int M, int64_t K, DType dtype, const void* a_, int rows, float* out) {
  constexpr int L = Math::LANES, NR = Math::NR;
  static_assert(RANKS % NR == 0);
  alignas(64) Value converted[RANKS * BLOCK];
  alignas(64) float totals[RANKS * MAX_DOTS * L];
  const Value* x = static_cast<const Value*>(x_);
  const char* a = static_cast<const char*>(a_);
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  const int64_t block = block_of<Math>(K);
  for (int64_t k = 0; k < K; k += block) {
    const int64_t length = K - k < block ? K - k : block;
    for (int j = 0; j < RANKS; j++) {
      const char* p = a + ((j < rows ? j : rows - 1) * K + k) * size;
      if (k + length < K)
        for (int64_t i = 0; i < block * size; i += 64) __builtin_prefetch(p + length * size + i);
      convert(dtype, p, length, converted + j * BLOCK);
    }
    dot_block<Math>(Steps<Value>{x + k, K, length, 0}, M, converted, RANKS, length, k == 0, totals);
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < RANKS; j += NR) {
      typename Math::F s[NR];
#pragma GCC unroll 4
      for (int i = 0; i < NR; i++) s[i] = Math::load_f32(totals + ((j + i) * M + m) * L);
      store<Math>(DType::f32, out, m * RANKS + j, Math::sum_each(s), NR);
    }
}

}  // namespace
}  // namespace lora_kernels::cpu
