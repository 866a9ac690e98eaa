// The float32 products of the levels "avx512" and "avx512bf16".
#pragma once
#include <immintrin.h>

#include "../loops/dots.h"
#include "../loops/tiles.h"
#include "avx512_weight.h"

namespace lora_kernels::cpu {
namespace {

inline __mmask16 mask16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
inline __mmask32 mask32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

// 16 x 16 dwords
inline __attribute__((always_inline)) void transpose16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

// T uint32_t: a dword is one value; uint16_t: two, a half one at the end filled with zero.
template <class T>
void transpose_wide(const void* src_, int64_t ld, int rows, int64_t n, uint32_t* dst, int64_t ld_dst) {
  const T* src = (const T*)src_;
  constexpr int PER = 4 / sizeof(T);
  const __mmask16 stored = mask16(rows);
  for (int64_t k = 0; k < n; k += 16 * PER) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) {
      const T* p = src + m * ld + k;
      if (m >= rows)
        r[m] = _mm512_setzero_si512();
      else if constexpr (PER == 1)
        r[m] = _mm512_maskz_loadu_epi32(mask16(n - k), p);
      else
        r[m] = _mm512_maskz_loadu_epi16(mask32(n - k), p);
    }
    transpose16(r);
    const int64_t left = (n - k + PER - 1) / PER;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++, dst += ld_dst)
      if (i < left) _mm512_mask_storeu_epi32(dst, stored, r[i]);
  }
}

struct MathF32 {
  using F = __m512;
  using W = __m512;
  using X = __m512;
  static constexpr int LANES = 16, NV = 4, WIDTH = 64, VALUES = 1;
  static constexpr int NR = 4, DIRECT = 8, DOTS = 16;
  static constexpr DType TYPE = DType::f32;
  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load_f32(const float* p) { return _mm512_loadu_ps(p); }
  static F load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(mask16(n), p); }
  static void store_f32(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static W right(const uint32_t* p) { return _mm512_loadu_ps(p); }
  static X broadcast(uint32_t v) { return _mm512_castsi512_ps(_mm512_set1_epi32((int)v)); }
  static F dot(F sum, X x, W w) { return _mm512_fmadd_ps(x, w, sum); }
  template <class D>
  static F load(D, const typename D::T* p) {
    return load16(D(), p);
  }
  static void store(F32, float* out, F v, int n) { _mm512_mask_storeu_ps(out, mask16(n), v); }
  static void store(F16, uint16_t* out, F v, int n) { _mm256_mask_storeu_epi16(out, mask16(n), pattern16(F16(), v)); }
  static void store(BF16, uint16_t* out, F v, int n) {
#ifdef __AVX512BF16__
    _mm256_mask_storeu_epi16(out, mask16(n), (__m256i)_mm512_cvtneps_pbh(v));
#else
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    _mm256_mask_storeu_epi16(out, mask16(n), _mm256_mask_mov_epi16(pattern16(BF16(), v), nan, _mm256_set1_epi16(0x7fc0)));
#endif
  }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sum_each(const F (&v)[NR]) {  // in the first NR lanes
    const F a = add(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const F b = add(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    const F each = add(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(each), _mm512_extractf32x8_ps(each, 1));
    return _mm512_castps128_ps512(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  static void store_own(void* out, int64_t i, F v) { store_f32(static_cast<float*>(out) + i, v); }
};

void interleave_wide(const void* src, int64_t ld, int64_t rows, int columns, uint32_t* dst, int64_t ld_dst,
                     int64_t group_stride) {
  const float* s = (const float*)src;
  for (int64_t k = 0; k < rows; k++, s += ld, dst += ld_dst)
    for (int g = 0; g * GROUP < columns; g++)
      _mm512_storeu_ps(dst + g * group_stride, _mm512_maskz_loadu_ps(mask16(columns - g * GROUP), s + g * GROUP));
}

template <class R>
struct DotsF32 {
  using Math = MathF32;
  using Value = float;
  static constexpr int STEP = 64, SPAN = 32, WAYS = 2;
  struct Code {
    __m512 values;
    explicit Code(const float* c) : values(_mm512_loadu_ps(c)) {}
  };
  using Table = __m512;
  static Table table(const Code& code, float absmax, float) {
    return rounded(R(), _mm512_mul_ps(code.values, _mm512_set1_ps(absmax)));
  }
  template <bool>
  static __m512 decode(const uint8_t* p, Table t, int way) {
    const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm512_permutexvar_ps(way == 0 ? _mm512_srli_epi32(v, 4) : v, t);
  }
};

}  // namespace
}  // namespace lora_kernels::cpu
