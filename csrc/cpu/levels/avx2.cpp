// Level "avx2": AVX2, FMA and F16C.
#include <immintrin.h>

#include "../convert.h"
#include "../loops/dots.h"
#include "../loops/tiles.h"
#include "../loops/weight.h"

namespace lora_kernels::cpu {
namespace {

inline __m256 load8(F32, const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(F16, const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline __m256 load8(BF16, const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

// Rounded to the dtype, as float32 bits with zeros below (bf16, float32) or as the 16-bit pattern (f16).
inline __m256i round_bf16(__m256 v) {
  const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_and_si256(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))),
                          _mm256_set1_epi32((int)0xffff0000));
}
inline __m256 rounded(F32, __m256 v) { return v; }
inline __m256 rounded(F16, __m256 v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline __m256 rounded(BF16, __m256 v) { return _mm256_castsi256_ps(round_bf16(v)); }

inline __m256i pattern16(F16, __m256 a, __m256 b) {  // 16 patterns in order
  return _mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256i pattern16(BF16, __m256 a, __m256 b) {
  const __m256i p = _mm256_packus_epi32(_mm256_srli_epi32(round_bf16(a), 16), _mm256_srli_epi32(round_bf16(b), 16));
  return _mm256_permute4x64_epi64(p, 0xd8);
}

// 16 bytes -> the 32 codes in order, one a byte
inline void codes32(const uint8_t* packed, __m128i& first, __m128i& second) {
  const __m128i v = _mm_loadu_si128((const __m128i*)packed), mask = _mm_set1_epi8(15);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(v, 4), mask), low = _mm_and_si128(v, mask);
  first = _mm_unpacklo_epi8(high, low);
  second = _mm_unpackhi_epi8(high, low);
}

// To float32: the table in two halves.
template <class R>
struct Decoder32 {
  __m256 code_low, code_high, low, high;
  Decoder32() = default;
  explicit Decoder32(const float* c) : code_low(_mm256_loadu_ps(c)), code_high(_mm256_loadu_ps(c + 8)) {}
  void set(float absmax) {
    const __m256 a = _mm256_set1_ps(absmax);
    low = rounded(R(), _mm256_mul_ps(code_low, a));
    high = rounded(R(), _mm256_mul_ps(code_high, a));
  }
  __m256 look(__m128i codes) const {  // the low 8 bytes
    return look(_mm256_cvtepu8_epi32(codes));
  }
  __m256 look(__m256i i) const {  // bits above 3 are ignored
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  }
  void store32(const uint8_t* packed, float* out) const {
    __m128i a, b;
    codes32(packed, a, b);
    _mm256_storeu_ps(out, look(a));
    _mm256_storeu_ps(out + 8, look(_mm_srli_si128(a, 8)));
    _mm256_storeu_ps(out + 16, look(b));
    _mm256_storeu_ps(out + 24, look(_mm_srli_si128(b, 8)));
  }
};

// To 16 bits: the table as two planes of bytes.
template <class D>
struct Decoder16 {
  __m256 code_low, code_high;
  __m128i plane0, plane1;
  explicit Decoder16(const float* c) : code_low(_mm256_loadu_ps(c)), code_high(_mm256_loadu_ps(c + 8)) {}
  void set(float absmax) {
    const __m256 a = _mm256_set1_ps(absmax);
    const __m256i t = pattern16(D(), _mm256_mul_ps(code_low, a), _mm256_mul_ps(code_high, a));
    const __m128i t0 = _mm256_castsi256_si128(t), t1 = _mm256_extracti128_si256(t, 1), byte = _mm_set1_epi16(255);
    plane0 = _mm_packus_epi16(_mm_and_si128(t0, byte), _mm_and_si128(t1, byte));
    plane1 = _mm_packus_epi16(_mm_srli_epi16(t0, 8), _mm_srli_epi16(t1, 8));
  }
  void store32(const uint8_t* packed, uint16_t* out) const {
    __m128i codes[2];
    codes32(packed, codes[0], codes[1]);
    for (int i = 0; i < 2; i++) {
      const __m128i b0 = _mm_shuffle_epi8(plane0, codes[i]), b1 = _mm_shuffle_epi8(plane1, codes[i]);
      _mm_storeu_si128((__m128i*)(out + 16 * i), _mm_unpacklo_epi8(b0, b1));
      _mm_storeu_si128((__m128i*)(out + 16 * i + 8), _mm_unpackhi_epi8(b0, b1));
    }
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
  template <class D>
  static uint32_t abs_bits(const typename D::T* x, int64_t n) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i m = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) m = _mm256_max_epi32(m, _mm256_and_si256(_mm256_castps_si256(load8(D(), x + i)), mask));
    __m128i r = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(r);
  }

  struct Search {  // a binary search whose step s looks up one of 2^s midpoints
    __m256 step0, step1, step2, step3;
    __m256i order;
    Search(const float* m, const uint8_t* o)
        : step0(_mm256_set1_ps(m[7])),
          step1(_mm256_setr_ps(m[3], m[11], 0, 0, 0, 0, 0, 0)),
          step2(_mm256_setr_ps(m[1], m[5], m[9], m[13], 0, 0, 0, 0)),
          step3(_mm256_setr_ps(m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14])),
          order(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)o))) {}
    __m256i find(__m256 v) const {
      auto next = [v](__m256i i, __m256 table) {  // 2 i + (v > table[i])
        const __m256 t = _mm256_permutevar8x32_ps(table, i);
        return _mm256_sub_epi32(_mm256_slli_epi32(i, 1), _mm256_castps_si256(_mm256_cmp_ps(v, t, _CMP_GT_OQ)));
      };
      __m256i i = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(v, step0, _CMP_GT_OQ)), 31);
      return next(next(next(i, step1), step2), step3);
    }
    template <class D>
    void quantize32(const typename D::T* x, float reciprocal, uint8_t* out) const {
      const __m256 scale = _mm256_set1_ps(reciprocal);
      __m256i c[4];
      for (int i = 0; i < 4; i++) c[i] = find(_mm256_mul_ps(load8(D(), x + 8 * i), scale));
      __m256i b = _mm256_packus_epi16(_mm256_packus_epi32(c[0], c[1]), _mm256_packus_epi32(c[2], c[3]));
      b = _mm256_permutevar8x32_epi32(b, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));  // undo the packs' 128-bit lanes
      b = _mm256_maddubs_epi16(_mm256_shuffle_epi8(order, b), _mm256_set1_epi16(0x0110));
      b = _mm256_permute4x64_epi64(_mm256_packus_epi16(b, b), 0x08);
      _mm_storeu_si128((__m128i*)out, _mm256_castsi256_si128(b));
    }
  };

  template <class D, class R>
  using Decoder = typename Select<D, R>::Type;
};

struct MathF32 {
  using F = __m256;
  using W = __m256;
  using X = __m256;
  static constexpr int LANES = 8, NV = 2, WIDTH = 16, VALUES = 1;
  static constexpr int NR = 2, DIRECT = 12, DOTS = 12;
  static constexpr DType TYPE = DType::f32;
  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load_f32(const float* p) { return _mm256_loadu_ps(p); }
  static F load_some(const float* p, int n) {
    if (n >= LANES) return _mm256_loadu_ps(p);
    float t[LANES] = {};
    for (int i = 0; i < n; i++) t[i] = p[i];
    return _mm256_loadu_ps(t);
  }
  static void store_f32(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static W right(const uint32_t* p) { return _mm256_loadu_ps((const float*)p); }
  static X broadcast(const uint32_t& v) { return _mm256_broadcast_ss((const float*)&v); }
  static F dot(F sum, X x, W w) { return _mm256_fmadd_ps(x, w, sum); }
  template <class D>
  static F load(D, const typename D::T* p) {
    return load8(D(), p);
  }
  static void store_whole(F32, float* out, F v) { _mm256_storeu_ps(out, v); }
  static void store_whole(F16, uint16_t* out, F v) {
    _mm_storeu_si128((__m128i*)out, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_whole(BF16, uint16_t* out, F v) {
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i u = _mm256_blendv_epi8(round_bf16(v), _mm256_set1_epi32(0x7fc00000), nan);
    const __m256i p = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(u, 16), u), 0xd8);
    _mm_storeu_si128((__m128i*)out, _mm256_castsi256_si128(p));
  }
  template <class D>
  static void store(D, typename D::T* out, F v, int n) {
    if (n >= LANES) return store_whole(D(), out, v);
    typename D::T t[LANES];
    store_whole(D(), t, v);
    for (int i = 0; i < n; i++) out[i] = t[i];
  }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sum_each(const F (&v)[NR]) {  // in the first NR lanes
    const F pairs = _mm256_hadd_ps(v[0], v[1]);
    const __m128 s = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    return _mm256_castps128_ps256(_mm_hadd_ps(s, s));
  }
  static void store_own(void* out, int64_t i, F v) { store_f32(static_cast<float*>(out) + i, v); }
};

void transpose_8x8(const void* src, int64_t ld, int rows, int64_t n, uint32_t* dst, int64_t ld_dst) {
  const float* s = (const float*)src;
  float* d = (float*)dst;
  int r = 0;
  for (; r + 8 <= rows; r += 8) {
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) {
      __m256 v[8], t[8];
      for (int i = 0; i < 8; i++) v[i] = _mm256_loadu_ps(s + (r + i) * ld + k);
      for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
      }
      for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
          v[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
          v[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
      for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(d + (k + i) * ld_dst + r, _mm256_permute2f128_ps(v[i], v[i + 4], 0x20));
        _mm256_storeu_ps(d + (k + i + 4) * ld_dst + r, _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
      }
    }
    transpose_f32(s + r * ld + k, ld, 8, n - k, dst + k * ld_dst + r, ld_dst);
  }
  transpose_f32(s + r * ld, ld, rows - r, n, dst + r, ld_dst);
}

template <class R>
struct DotsF32 {
  using Math = MathF32;
  using Value = float;
  static constexpr int STEP = 64, SPAN = 16, WAYS = 2;
  using Code = Decoder32<R>;
  using Table = Decoder32<R>;
  static Table table(const Code& code, float absmax, float) {
    Table t = code;
    t.set(absmax);
    return t;
  }
  template <bool>
  static __m256 decode(const uint8_t* p, const Table& t, int way) {
    const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    return t.look(way == 0 ? _mm256_srli_epi32(v, 4) : v);
  }
};

}  // namespace

constexpr Kernels avx2_kernels =
    make_kernels<V, DotsF32>("avx2", make_gemm_f32<MathF32, DotsF32>(transpose_8x8, interleave_f32));

}  // namespace lora_kernels::cpu
