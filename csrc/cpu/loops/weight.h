// The loops over a weight, and the tables of one instruction-set level, over a struct V that says how it works on a weight:
//   V::template abs_bits<D>(x, n)                        largest bit pattern of |x|, n % 32 == 0
//   V::Search(midpoints, order), .quantize32<D>(x, reciprocal, out16)
//   V::Decoder<D, R>(codebook), .set(absmax), .store32(packed16, out)   values rounded to R, stored as D
//   V::Map(code2), .decode64(absmax_u8, absmax2, offset, out)           with AVX512-VBMI only
#pragma once
#include "../../formats.h"
#include "../convert.h"
#include "../kernels.h"
#include "dots.h"
#include "tiles.h"

namespace lora_kernels::cpu {
namespace {

template <class V, class D>
bool quantize(const void* x_, int64_t b0, int64_t b1, int64_t blocksize, const float* midpoints, const uint8_t* order,
              uint8_t* packed, float* absmax) {
  const typename D::T* x = static_cast<const typename D::T*>(x_);
  const typename V::Search search(midpoints, order);
  uint32_t largest = 0;  // of integers, so that NaN counts as the largest
  for (int64_t b = b0; b < b1; b++) {
    const typename D::T* block = x + b * blocksize;
    const uint32_t m = V::template abs_bits<D>(block, blocksize);
    if (m > largest) largest = m;
    absmax[b] = from_bits(m);
    const float reciprocal = 1.0f / (absmax[b] > 1e-38f ? absmax[b] : 1e-38f);
    for (int64_t i = 0; i < blocksize; i += 32)
      search.template quantize32<D>(block + i, reciprocal, packed + (b * blocksize + i) / 2);
  }
  return largest < 0x7f800000;
}

template <class V, class D, class R>
void decode(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0, int64_t e1, void* out_) {
  typename D::T* out = static_cast<typename D::T*>(out_);
  typename V::template Decoder<D, R> decoder(codebook);
  for (int64_t e = e0; e < e1;) {
    const int64_t b = e >> shift;
    int64_t end = (b + 1) << shift;
    if (end > e1) end = e1;
    const float scale = absmax[b];
    auto one = [&](int code) { return D::store(R::load(R::store(codebook[code] * scale))); };
    const uint8_t* p = packed + (e >> 1);
    if (e & 1) {
      *out++ = one(second_code(*p++));
      e++;
    }
    const int64_t n = end - e;
    int64_t i = 0;
    if (n >= 32) {
      decoder.set(scale);
      for (; i + 32 <= n; i += 32) decoder.store32(p + i / 2, out + i);
    }
    for (; i < n; i++) out[i] = one(i & 1 ? second_code(p[i / 2]) : first_code(p[i / 2]));
    out += n;
    e = end;
  }
}

template <class V>
void decode_absmax(const uint8_t* absmax_u8, const float* absmax2, const float* code2, float offset, int64_t i0, int64_t i1,
                   float* out) {
  int64_t i = i0;
#ifdef __AVX512VBMI__
  if (i1 - i0 >= 128) {
    const typename V::Map map(code2);
    for (; i < i1 && (i & 63); i++) out[i - i0] = code2[absmax_u8[i]] * absmax2[i >> 8] + offset;
    for (; i + 64 <= i1; i += 64) map.decode64(absmax_u8 + i, absmax2[i >> 8], offset, out + (i - i0));
  }
#endif
  for (; i < i1; i++) out[i - i0] = code2[absmax_u8[i]] * absmax2[i >> 8] + offset;
}

void drop_f32(const float* value, uint64_t seed, uint64_t threshold, int64_t e0, int64_t n, float* out) {
  constexpr int G = 16;  // counters at a time
  for (int64_t e = e0; e < e0 + n;) {
    const int64_t j0 = e >> 2;
    uint32_t c0[G], c1[G], c2[G], c3[G];
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int g = 0; g < G; g++) {
      c0[g] = static_cast<uint32_t>(j0 + g);
      c1[g] = static_cast<uint32_t>(static_cast<uint64_t>(j0 + g) >> 32);
      c2[g] = c3[g] = 0;
    }
    for (int round = 0; round < 10; round++) {
      for (int g = 0; g < G; g++) {
        const uint64_t p0 = static_cast<uint64_t>(c0[g]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2[g]) * 0xCD9E8D57u;
        c0[g] = static_cast<uint32_t>(p1 >> 32) ^ c1[g] ^ k0;
        c1[g] = static_cast<uint32_t>(p1);
        c2[g] = static_cast<uint32_t>(p0 >> 32) ^ c3[g] ^ k1;
        c3[g] = static_cast<uint32_t>(p0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    uint32_t word[4 * G];
    for (int g = 0; g < G; g++) {
      word[4 * g] = c0[g];
      word[4 * g + 1] = c1[g];
      word[4 * g + 2] = c2[g];
      word[4 * g + 3] = c3[g];
    }
    int64_t end = 4 * (j0 + G);
    if (end > e0 + n) end = e0 + n;
    for (; e < end; e++) out[e - e0] = word[e - 4 * j0] >= threshold ? value[e - e0] : 0.0f;
  }
}

// The float32 product of a level: Math its vectors, Dots<R> how it decodes W rounded to R.
template <class Math, template <class R> class Dots>
constexpr Gemm make_gemm_f32(decltype(Gemm::transpose) transpose, decltype(Gemm::interleave) interleave) {
  Gemm g{};
  g.values = Math::VALUES;
  g.width = Math::WIDTH;
  g.rows = ROWS;
  g.grain = 1;
  g.row_major = false;
  g.convert = convert_f32<Math>;
  g.transpose = transpose;
  g.interleave = interleave;
  g.tile = tile<Math>;
  g.rank_tile = rank_tile<Math>;
  g.store = scale_store<Math>;
  g.rank_dots = rank_dots<Math, float, convert_f32<Math>>;
  g.few = Math::DOTS;
  g.step = Dots<F32>::STEP;
  g.split = split<Dots<F32>>;
  return g;
}

// All kernels of a level but its bf16 product: without one, bf16 is multiplied in float32.
template <class V, template <class R> class Dots>
constexpr Kernels make_kernels(const char* name, const Gemm& f32) {
  Kernels k{};
  k.name = name;
  k.f32 = f32;
  k.quantize_f32 = quantize<V, F32>;
  k.quantize_f16 = quantize<V, F16>;
  k.quantize_bf16 = quantize<V, BF16>;
  k.decode_absmax = decode_absmax<V>;
  k.decode_f32 = decode<V, F32, F32>;
  k.decode_f16 = decode<V, F16, F16>;
  k.decode_bf16 = decode<V, BF16, BF16>;
  k.decode_f16_as_f32 = decode<V, F32, F16>;
  k.decode_bf16_as_f32 = decode<V, F32, BF16>;
  k.dots_f32 = dots<Dots<F32>>;
  k.dots_f16 = dots<Dots<F16>>;
  k.dots_bf16 = dots<Dots<BF16>>;
  k.drop_f32 = drop_f32;
  return k;
}

}  // namespace
}  // namespace lora_kernels::cpu
