// What the levels "avx512" (F, BW, VL, DQ) and "avx512bf16" (and VBMI, BF16) do with a weight: one source, two sets of flags.
#pragma once
#include <immintrin.h>

#include "../convert.h"

namespace lora_kernels::cpu {
namespace {

inline __m512 load16(F32, const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(F16, const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline __m512 load16(BF16, const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline __m256i pattern16(F16, __m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i pattern16(BF16, __m512 v) {
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
}
inline __m512 rounded(F32, __m512 v) { return v; }
inline __m512 rounded(F16, __m512 v) { return _mm512_cvtph_ps(pattern16(F16(), v)); }
inline __m512 rounded(BF16, __m512 v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(pattern16(BF16(), v)), 16));
}

// The 16 products code * absmax as 16-bit patterns, held twice: vpermw reads five bits of an index.
inline __m512i table16(F16, __m512 codebook, float absmax) {
  return _mm512_broadcast_i64x4(pattern16(F16(), _mm512_mul_ps(codebook, _mm512_set1_ps(absmax))));
}
inline __m512i table16(BF16, __m512 codebook, float absmax) {
  const __m512 p = _mm512_mul_ps(codebook, _mm512_set1_ps(absmax));
#ifdef __AVX512BF16__
  // vcvtne2ps2bf16 flushes denormals, which a larger absmax can't give
  if (__builtin_expect(__builtin_fabsf(absmax) > 1e-30f, 1)) return (__m512i)_mm512_cvtne2ps_pbh(p, p);
#endif
  return _mm512_broadcast_i64x4(pattern16(BF16(), p));
}

// To float32.
template <class R>
struct Decoder32 {
  __m512 codebook, table;
  explicit Decoder32(const float* c) : codebook(_mm512_loadu_ps(c)) {}
  void set(float absmax) { table = rounded(R(), _mm512_mul_ps(codebook, _mm512_set1_ps(absmax))); }
  void store32(const uint8_t* packed, float* out) const {
    for (int i = 0; i < 2; i++) {
      const __m512i v = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(packed + 8 * i)));
      const __m512i codes = _mm512_or_si512(_mm512_srli_epi64(v, 4), _mm512_slli_epi64(v, 32));  // bits above 3 are ignored
      _mm512_storeu_ps(out + 16 * i, _mm512_permutexvar_ps(codes, table));
    }
  }
};

// To 16 bits.
template <class D>
struct Decoder16 {
  __m512 codebook;
  __m512i table;
  explicit Decoder16(const float* c) : codebook(_mm512_loadu_ps(c)) {}
  void set(float absmax) { table = table16(D(), codebook, absmax); }
  void store32(const uint8_t* packed, uint16_t* out) const {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)packed);
#ifdef __AVX512VBMI__
    // the four codes of two bytes, high nibble first; bit 4 of a code may be dirty, the table is held twice
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0008000c00000004LL), _mm512_cvtepu16_epi64(bytes));
#else
    const __m512i v = _mm512_cvtepu8_epi32(bytes);
    const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(v, 4), _mm512_slli_epi32(v, 16));
#endif
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, table));
  }
};

template <class D, class R>
struct Select {
  using Type = Decoder16<D>;
};
template <class R>
struct Select<F32, R> {
  using Type = Decoder32<R>;
};

struct V {
  template <class D, class R>
  using Decoder = typename Select<D, R>::Type;

  template <class D>
  static uint32_t abs_bits(const typename D::T* x, int64_t n) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    __m512i m = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16)
      m = _mm512_max_epi32(m, _mm512_and_si512(_mm512_castps_si512(load16(D(), x + i)), mask));
    return (uint32_t)_mm512_reduce_max_epi32(m);
  }

  struct Search {  // a binary search: four compares find how many midpoints are below v
    __m512 middle, midpoints;
    __m256i order;
    Search(const float* m, const uint8_t* o)
        : middle(_mm512_set1_ps(m[7])),
          midpoints(_mm512_maskz_loadu_ps(0x7fff, m)),
          order(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)o))) {}
    __m128i find(__m512 v) const {
      __m512i i = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, middle, _CMP_GT_OQ), 8);
      for (int step = 4; step; step /= 2) {
        const __m512 t = _mm512_permutexvar_ps(_mm512_add_epi32(i, _mm512_set1_epi32(step - 1)), midpoints);
        i = _mm512_mask_add_epi32(i, _mm512_cmp_ps_mask(v, t, _CMP_GT_OQ), i, _mm512_set1_epi32(step));
      }
      return _mm512_cvtepi32_epi8(i);
    }
    template <class D>
    void quantize32(const typename D::T* x, float reciprocal, uint8_t* out) const {
      const __m512 scale = _mm512_set1_ps(reciprocal);
      const __m128i a = find(_mm512_mul_ps(load16(D(), x), scale)), b = find(_mm512_mul_ps(load16(D(), x + 16), scale));
      const __m256i codes = _mm256_shuffle_epi8(order, _mm256_set_m128i(b, a));
      const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
      _mm_storeu_si128((__m128i*)out, _mm256_cvtepi16_epi8(pairs));
    }
  };

#ifdef __AVX512VBMI__
  // A 256-entry float32 table as four planes of bytes: 64 lookups are two vpermi2b and a blend a plane.
  struct Map {
    alignas(64) uint8_t plane[4][256];
    explicit Map(const float* code2) {
      for (int i = 0; i < 256; i += 16)
        for (int p = 0; p < 4; p++)
          _mm_store_si128((__m128i*)(plane[p] + i),
                          _mm512_cvtepi32_epi8(_mm512_srli_epi32(_mm512_loadu_si512(code2 + i), 8 * p)));
    }
    void decode64(const uint8_t* absmax_u8, float absmax2, float offset, float* out) const {
      // so that the two rounds of unpacking below leave 16 values in order in each register
      const __m512i order = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
                                                     _mm512_loadu_si512(absmax_u8));
      const __mmask64 upper = _mm512_movepi8_mask(order);
      __m512i b[4];
      for (int p = 0; p < 4; p++) {
        const __m512i* t = (const __m512i*)plane[p];
        b[p] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t[0], order, t[1]),
                                      _mm512_permutex2var_epi8(t[2], order, t[3]));
      }
      const __m512i low0 = _mm512_unpacklo_epi8(b[0], b[1]), high0 = _mm512_unpackhi_epi8(b[0], b[1]);
      const __m512i low1 = _mm512_unpacklo_epi8(b[2], b[3]), high1 = _mm512_unpackhi_epi8(b[2], b[3]);
      const __m512i r[4] = {_mm512_unpacklo_epi16(low0, low1), _mm512_unpackhi_epi16(low0, low1),
                            _mm512_unpacklo_epi16(high0, high1), _mm512_unpackhi_epi16(high0, high1)};
      const __m512 scale = _mm512_set1_ps(absmax2), shift = _mm512_set1_ps(offset);
      for (int q = 0; q < 4; q++)
        _mm512_storeu_ps(out + 16 * q, _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(r[q]), scale), shift));
    }
  };
#endif
};

}  // namespace
}  // namespace lora_kernels::cpu
