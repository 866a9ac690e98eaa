// Level "avx512bf16": level "avx512" with VBMI, and with products of bf16.
#include <immintrin.h>

#include "../loops/dots.h"
#include "../loops/tiles.h"
#include "../loops/weight.h"
#include "avx512_products.h"
#include "avx512_weight.h"

namespace lora_kernels::cpu {
namespace {

struct MathBF16 : MathF32 {
  using W = __m512bh;
  using X = __m512bh;
  static constexpr int VALUES = 2, DIRECT = 7;
  static constexpr DType TYPE = DType::bf16;
  static W right(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static X broadcast(uint32_t v) { return (__m512bh)_mm512_set1_epi32((int)v); }
  static F dot(F sum, X x, W w) { return _mm512_dpbf16_ps(sum, x, w); }
  static void store_own(void* out, int64_t i, F v) {
    _mm256_storeu_si256((__m256i*)((uint16_t*)out + i), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

void convert_bf16(DType dtype, const void* src, int64_t n, void* dst_) {
  uint16_t* dst = (uint16_t*)dst_;
  auto run = [&](auto format) {
    using D = decltype(format);
    const typename D::T* s = (const typename D::T*)src;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) MathF32::store(BF16(), dst + i, load16(D(), s + i), 16);
    for (; i < n; i++) dst[i] = BF16::store(D::load(s[i]));
  };
  if (dtype == DType::f32)
    run(F32());
  else if (dtype == DType::bf16)
    run(BF16());
  else
    run(F16());
}

// Two rows of 32 values -> 32 pairs, in two registers.
struct Interleave {
  __m512i low, high;
  Interleave() {
    const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    low = _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(32)), 16));
    high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  }
  __m512i first(__m512i a, __m512i b) const { return _mm512_permutex2var_epi16(a, low, b); }
  __m512i second(__m512i a, __m512i b) const { return _mm512_permutex2var_epi16(a, high, b); }
};

void interleave_pairs(const void* src, int64_t ld, int64_t rows, int columns, uint32_t* dst, int64_t ld_dst,
                      int64_t group_stride) {
  const Interleave pairs;
  for (int c = 0; c < columns; c += 32) {
    const __mmask32 loaded = mask32(columns - c);
    const bool both = columns - c > GROUP;
    const uint16_t* s = (const uint16_t*)src + c;
    uint32_t* d = dst + c / GROUP * group_stride;
    for (int64_t k = 0; k < rows; k += 2, s += 2 * ld, d += ld_dst) {
      const __m512i a = _mm512_maskz_loadu_epi16(loaded, s);
      const __m512i b = k + 1 < rows ? _mm512_maskz_loadu_epi16(loaded, s + ld) : _mm512_setzero_si512();
      _mm512_storeu_si512(d, pairs.first(a, b));
      if (both) _mm512_storeu_si512(d + group_stride, pairs.second(a, b));
    }
  }
}

// 16 bytes -> 32 weights in order.
inline __m512i decode32(const uint8_t* packed, __m512i table) {
  const __m512i v = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)packed));
  return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0008000c00000004LL), v), table);
}

template <int HALVES>  // of 64 weights that share a scale
void decode_rows_by(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t K, int64_t n0,
                    int64_t k0, int64_t k1, uint32_t* dst, int64_t ld_dst) {
  const __m512 code = _mm512_loadu_ps(codebook);
  for (int64_t k = k0; k < k1; k += 32 * HALVES) {
    __m512i r[HALVES][16];
    const bool fetch = !(k & 64);
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
      const int64_t e = (n0 + j) * K + k;
      const uint8_t* p = packed + e / 2;
      if (fetch) _mm_prefetch((const char*)(p + 512), _MM_HINT_T0);
      const __m512i table = table16(BF16(), code, absmax[e >> shift]);
      for (int i = 0; i < HALVES; i++) r[i][j] = decode32(p + 16 * i, table);
    }
    for (int i = 0; i < HALVES; i++) {
      transpose16(r[i]);
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++, dst += ld_dst) _mm512_storeu_si512(dst, r[i][j]);
    }
  }
}

void decode_rows(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t K, int64_t n0,
                 int64_t k0, int64_t k1, uint32_t* dst, int64_t ld_dst) {
  if (shift >= 6 && K % 64 == 0)
    decode_rows_by<2>(packed, codebook, absmax, shift, K, n0, k0, k1, dst, ld_dst);
  else
    decode_rows_by<1>(packed, codebook, absmax, shift, K, n0, k0, k1, dst, ld_dst);
}

template <int HALVES>
void decode_columns_by(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t K, int64_t n0,
                       int64_t n1, int64_t k0, int columns, uint32_t* dst, int64_t ld_dst) {
  const __m512 code = _mm512_loadu_ps(codebook);
  const Interleave pairs;
  for (int64_t n = n0; n < n1; n += 2, dst += ld_dst) {
    const bool two = n + 1 < n1;
    _mm_prefetch((const char*)(packed + ((n + 8) * K + k0) / 2), _MM_HINT_T0);
    _mm_prefetch((const char*)(packed + ((n + 9) * K + k0) / 2), _MM_HINT_T0);
    for (int c = 0; c < columns; c += 32 * HALVES) {
      const int64_t e = n * K + k0 + c;
      const uint8_t* p = packed + e / 2;
      const __m512i a = table16(BF16(), code, absmax[e >> shift]);
      const __m512i b = two ? table16(BF16(), code, absmax[(e + K) >> shift]) : _mm512_setzero_si512();
      const uint8_t* q = two ? p + K / 2 : p;
      for (int i = 0; i < HALVES; i++) {
        const __m512i v = decode32(p + 16 * i, a), w = decode32(q + 16 * i, b);
        _mm512_storeu_si512(dst + c + 32 * i, pairs.first(v, w));
        _mm512_storeu_si512(dst + c + 32 * i + 16, pairs.second(v, w));
      }
    }
  }
}

void decode_columns(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t K, int64_t n0,
                    int64_t n1, int64_t k0, int columns, uint32_t* dst, int64_t ld_dst) {
  if (shift >= 6 && K % 64 == 0)
    decode_columns_by<2>(packed, codebook, absmax, shift, K, n0, n1, k0, columns, dst, ld_dst);
  else
    decode_columns_by<1>(packed, codebook, absmax, shift, K, n0, n1, k0, columns, dst, ld_dst);
}

struct DotsBF16 {
  using Math = MathBF16;
  using Value = uint16_t;
  static constexpr int STEP = 128, SPAN = 128, WAYS = 4;
  using Code = DotsF32<F32>::Code;
  // Of two blocks, one in each half.  Flushes denormals, as the product does.
  using Table = __m512i;
  static Table table(const Code& code, float first, float second) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(code.values, _mm512_set1_ps(second)),
                                        _mm512_mul_ps(code.values, _mm512_set1_ps(first)));
  }
  // A word holds four codes; bit 4 of an index says which of the two blocks it is in.
  template <bool HALF>
  static __m512bh decode(const uint8_t* p, Table t, int way) {
    const __m512i v = HALF ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)) : _mm512_loadu_si512(p);
    const __m512i codes = way % 2 ? v : _mm512_srli_epi16(v, 4);
    const __m512i block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
    const __m512i bytes = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(15), block, 0xea);  // codes & 15 | block
    return (__m512bh)_mm512_permutexvar_epi16(way < 2 ? bytes : _mm512_srli_epi16(bytes, 8), t);
  }
};

constexpr Gemm make_gemm_bf16() {
  Gemm g{};
  g.values = MathBF16::VALUES;
  g.width = MathBF16::WIDTH;
  g.rows = ROWS;
  g.grain = 1;
  g.row_major = false;
  g.convert = convert_bf16;
  g.transpose = transpose_wide<uint16_t>;
  g.interleave = interleave_pairs;
  g.tile = tile<MathBF16>;
  g.rank_tile = rank_tile<MathBF16>;
  g.store = scale_store<MathBF16>;
  g.rank_dots = rank_dots<MathBF16, uint16_t, convert_bf16>;
  g.few = MathBF16::DOTS;
  g.step = DotsBF16::STEP;
  g.split = split<DotsBF16>;
  g.decode_rows = decode_rows;
  g.decode_columns = decode_columns;
  return g;
}

constexpr Kernels make_level() {
  const Gemm f32 = make_gemm_f32<MathF32, DotsF32>(transpose_wide<uint32_t>, interleave_wide);
  Kernels k = make_kernels<V, DotsF32>("avx512bf16", f32);
  k.bf16 = make_gemm_bf16();
  k.dots_bf16 = dots<DotsBF16>;
  return k;
}

}  // namespace

constexpr Kernels avx512bf16_kernels = make_level();

}  // namespace lora_kernels::cpu
