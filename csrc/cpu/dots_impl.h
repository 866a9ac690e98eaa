// The product of a few rows of x with rows of W decoded in registers, over a struct S that says how a level decodes:
//   S::F, MathF32 of the level        float32 vectors
//   S::SPAN, S::X                     weights decoded at a time, as two vectors: the even ones and the odd ones
//   S::Code(codebook), S::table(code, absmax), S::decode(packed, table, even, odd), S::dot(sum, weights, x)
#pragma once
#include "gemm_impl.h"

namespace lora_kernels::cpu {
namespace {

template <class S, int MR, int NR>
inline __attribute__((always_inline)) void dots_of(const Dots& d, int64_t n, int64_t n0, int m0) {
  using F = typename S::F;
  using Value = typename S::Value;
  constexpr int L = MathF32::LANES, SPAN = S::SPAN;
  const typename S::Code code(d.codebook);
  const Value* x = static_cast<const Value*>(d.x) + m0 * d.K;
  F totals[NR][MR], sums[NR][MR];
  F odds[NR];  // of one row of x, the sums of odd elements are kept apart: they would wait for each other
#pragma GCC unroll 4
  for (int j = 0; j < NR; j++) {
    odds[j] = MathF32::zero();
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) sums[j][m] = totals[j][m] = MathF32::zero();
  }
  // Of float32, a chunk is summed apart: the error of a sum grows with the square root of its length.
  constexpr bool CHUNKS = sizeof(Value) == 4;
  for (int64_t k = 0; k < d.K; k += 64) {
    if (CHUNKS && k > 0 && k % (F32_BLOCK * L) == 0) {
#pragma GCC unroll 4
      for (int j = 0; j < NR; j++)
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) {
          totals[j][m] = MathF32::add(totals[j][m], sums[j][m]);
          sums[j][m] = MathF32::zero();
          if (MR > 1) continue;
          totals[j][m] = MathF32::add(totals[j][m], odds[j]);
          odds[j] = MathF32::zero();
        }
    }
    typename S::Table tables[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) {
      tables[j] = S::table(code, d.absmax[(d.before + (n - n0 + j) * d.K + k) >> d.shift]);
      __builtin_prefetch(d.packed + ((n + j) * d.K + k) / 2 + (32 << 10));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 64; i += SPAN) {
#pragma GCC unroll 4
      for (int j = 0; j < NR; j++) {
        typename S::X even, odd;
        S::decode(d.packed + ((n + j) * d.K + k + i) / 2, tables[j], even, odd);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) {
          const Value* v = x + m * d.K + k + i;
          sums[j][m] = S::dot(sums[j][m], even, v);
          F& other = MR == 1 ? odds[j] : sums[j][m];
          other = S::dot(other, odd, v + SPAN / 2);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++) {
    float out[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) {
      F s = CHUNKS ? MathF32::add(totals[j][m], sums[j][m]) : sums[j][m];
      if (MR == 1) s = MathF32::add(s, odds[j]);
      for (int64_t q = 0; q < d.rank; q += L)
        s = MathF32::fma(MathF32::load_f32(d.B + (n - n0 + j) * d.rank + q), MathF32::load_f32(d.h + (m0 + m) * d.rank + q), s);
      out[j] = MathF32::sum(s);
      if (d.bias) out[j] += d.bias[n - n0 + j];
      const int64_t i = (m0 + m) * d.N + n + j;
      if (d.dtype == DType::f32)
        static_cast<float*>(d.y)[i] = out[j];
      else
        static_cast<uint16_t*>(d.y)[i] = d.dtype == DType::bf16 ? BF16::store(out[j]) : F16::store(out[j]);
    }
  }
}

template <class S, int NR>
inline void dots_rows(const Dots& d, int64_t n, int64_t n0) {
  for (int m = 0; m < d.M;) {
    const int left = d.M - m;
    if (left >= 4 && left != 5) {
      dots_of<S, 4, NR>(d, n, n0, m);
      m += 4;
    } else if (left >= 3) {
      dots_of<S, 3, NR>(d, n, n0, m);
      m += 3;
    } else if (left == 2) {
      dots_of<S, 2, NR>(d, n, n0, m);
      m += 2;
    } else {
      dots_of<S, 1, NR>(d, n, n0, m);
      m += 1;
    }
  }
}

template <class S>
void dots(const Dots& d, int64_t n0, int64_t n1) {
  int64_t n = n0;
  for (; n + S::NR <= n1; n += S::NR) dots_rows<S, S::NR>(d, n, n0);
  for (; n < n1; n++) dots_rows<S, 1>(d, n, n0);
}

template <class T, int SPAN>
void split(const void* x, int64_t n, void* dst) {
  const T* s = static_cast<const T*>(x);
  T* d = static_cast<T*>(dst);
  for (int64_t i = 0; i < n; i += SPAN)
    for (int j = 0; j < SPAN / 2; j++) {
      d[i + j] = s[i + 2 * j];
      d[i + SPAN / 2 + j] = s[i + 2 * j + 1];
    }
}

template <class M>
void rank_dots(const void* x, int64_t M_, int64_t K, const void* a, int rows, float* out) {
  constexpr int L = M::LANES;
  const int64_t steps = K / M::VALUES;
  const uint32_t* A[RANKS];
  for (int j = 0; j < RANKS; j++) A[j] = static_cast<const uint32_t*>(a) + (j < rows ? j : 0) * steps;
  for (int64_t m = 0; m < M_; m++) {
    const uint32_t* v = static_cast<const uint32_t*>(x) + m * steps;
    typename M::F totals[RANKS], sums[RANKS];
#pragma GCC unroll 4
    for (int j = 0; j < RANKS; j++) totals[j] = M::zero();
    for (int64_t begin = 0, end; begin < steps; begin = end) {
      end = steps - begin < F32_BLOCK * L ? steps : begin + F32_BLOCK * L;
#pragma GCC unroll 4
      for (int j = 0; j < RANKS; j++) sums[j] = M::zero();
      for (int64_t k = begin; k < end; k += L) {
        const typename M::X values = M::right(v + k);
#pragma GCC unroll 4
        for (int j = 0; j < RANKS; j++) sums[j] = M::dot(sums[j], values, M::right(A[j] + k));
      }
#pragma GCC unroll 4
      for (int j = 0; j < RANKS; j++) totals[j] = M::add(totals[j], sums[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < RANKS; j++) out[m * RANKS + j] = M::sum(totals[j]);
  }
}

}  // namespace
}  // namespace lora_kernels::cpu
