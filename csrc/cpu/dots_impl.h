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
      __builtin_prefetch(d.packed + ((n + j) * d.K + k) / 2 + 16384);
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
  float B[NR][MAX_DOTS_RANK];
  for (int j = 0; j < NR && d.r; j++) {
    const int64_t size = d.B_dtype == DType::f32 ? 4 : 2;
    for (int64_t q = d.r; q < d.h_ld; q++) B[j][q] = 0;
    convert_f32<MathF32>(d.B_dtype, static_cast<const char*>(d.B) + (n + j) * d.r * size, d.r, B[j]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++) {
    float out[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) {
      F s = CHUNKS ? MathF32::add(totals[j][m], sums[j][m]) : sums[j][m];
      if (MR == 1) s = MathF32::add(s, odds[j]);
      for (int64_t q = 0; q < d.h_ld; q += L)
        s = MathF32::add(s, MathF32::mul(MathF32::load_f32(B[j] + q), MathF32::load_f32(d.h + (m0 + m) * d.h_ld + q)));
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

void rank_dots(const float* x, int64_t M, int64_t K, const void* A, DType dtype, float* out) {
  using M32 = MathF32;
  constexpr int L = M32::LANES;
  constexpr int64_t CHUNK = 512;
  for (int64_t m = 0; m < M; m++) out[m] = 0;
  for (int64_t k0 = 0; k0 < K; k0 += CHUNK) {
    const int64_t n = K - k0 < CHUNK ? K - k0 : CHUNK;
    float a[CHUNK];
    convert_f32<M32>(dtype, static_cast<const char*>(A) + k0 * (dtype == DType::f32 ? 4 : 2), n, a);
    for (int64_t m = 0; m < M; m++) {
      const float* v = x + m * K + k0;
      M32::F sums[4] = {M32::zero(), M32::zero(), M32::zero(), M32::zero()};
      int64_t k = 0;
      for (; k + 4 * L <= n; k += 4 * L)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[i] = M32::fma(M32::load_f32(a + k + i * L), M32::load_f32(v + k + i * L), sums[i]);
      float s = M32::sum(M32::add(M32::add(sums[0], sums[1]), M32::add(sums[2], sums[3])));
      for (; k < n; k++) s += a[k] * v[k];
      out[m] += s;
    }
  }
}

}  // namespace
}  // namespace lora_kernels::cpu
