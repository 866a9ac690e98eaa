// The tiles of the packed matrix product, over a struct M that says how one instruction-set level multiplies:
//   M::F, M::W, M::X        WIDTH-independent vectors of M::LANES sums, right operands and broadcast left operands
//   M::NV, M::WIDTH         vectors of columns in a tile; columns side by side in memory
//   M::VALUES               contraction steps in a dword
//   M::TYPE, store_own      the dtype that is multiplied, and the store of whole vectors to it
//   M::zero, load_f32, store_f32, add, mul, set1, right, broadcast, dot, store(dtype, out, v, n), convert, ...
#pragma once
#include "convert.h"
#include "kernels.h"

namespace lora_kernels::cpu {
namespace {

template <class M, int MR, int NV>
inline __attribute__((always_inline)) void multiply(const uint32_t* __restrict left, const uint32_t* __restrict right,
                                                    int64_t ld, int64_t steps, typename M::F (&sums)[MR][NV]) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sums[m][v] = M::zero();
  int64_t k = 0;
  if constexpr (NV == 1) {  // bound by the latency of the additions: even and odd steps apart
    typename M::F odd[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) odd[m] = M::zero();
    for (; k + 2 <= steps; k += 2, left += 2 * MR, right += 2 * ld) {
      const typename M::W w0 = M::right(right), w1 = M::right(right + ld);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        sums[m][0] = M::dot(sums[m][0], M::broadcast(left[m]), w0);
        odd[m] = M::dot(odd[m], M::broadcast(left[MR + m]), w1);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) sums[m][0] = M::add(sums[m][0], odd[m]);
  }
  for (; k < steps; k++, left += MR, right += ld) {
    typename M::W w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) w[v] = M::right(right + M::LANES * v);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const typename M::X x = M::broadcast(left[m]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sums[m][v] = M::dot(sums[m][v], x, w[v]);
    }
  }
}

// The first n of the lanes of v -> out[i ..] of `dtype`.
template <class M>
inline void store(DType dtype, void* out, int64_t i, typename M::F v, int n) {
  if (dtype == DType::f32)
    M::store(F32(), static_cast<float*>(out) + i, v, n);
  else if (dtype == DType::bf16)
    M::store(BF16(), static_cast<uint16_t*>(out) + i, v, n);
  else
    M::store(F16(), static_cast<uint16_t*>(out) + i, v, n);
}

// What is not common, from sums [rows, NV vectors] in memory: partial sums and an output beside which nothing else is added are
// handled where the sums still are in registers.
template <class M>
__attribute__((noinline)) void finish_rows(int rows, const float* sums, int c0, const Finish& t) {
  constexpr int L = M::LANES, NV = M::NV;
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < NV; v++) {
      const int c = c0 + L * v, i = m * COLUMNS + c;
      if (c >= t.columns) break;
      typename M::F s = M::load_f32(sums + (m * NV + v) * L);
      if (t.add_partial) s = M::add(s, M::load_f32(t.partial + i));
      if (t.bias) s = M::add(s, M::load_f32(t.bias + c));
      if (t.extra) s = M::add(s, M::load_f32(t.extra + i));
      if (t.accumulate) s = M::add(s, M::load_some(static_cast<const float*>(t.out) + m * t.ld + c, t.columns - c));
      store<M>(t.dtype, t.out, m * t.ld + c, s, t.columns - c);
    }
}

template <class M, int MR>
void tile_of(const uint32_t* left, const uint32_t* right, int64_t steps, const Finish& t) {
  constexpr int L = M::LANES, NV = M::NV;
  const bool plain = t.dtype == M::TYPE && !t.bias && !t.extra && !t.accumulate;
  for (int c0 = 0; c0 < t.columns; c0 += NV * L) {
    typename M::F sums[MR][NV];
    float total[MR * NV * L];
    for (int64_t k = 0;;) {
      const int64_t n = M::VALUES == 1 && steps - k > F32_BLOCK ? F32_BLOCK : steps - k;
      multiply<M, MR, NV>(left + k * MR, right + c0 + k * M::WIDTH, M::WIDTH, n, sums);
      if (M::VALUES == 2) break;
      if (k > 0) {
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++) sums[m][v] = M::add(sums[m][v], M::load_f32(total + (m * NV + v) * L));
      }
      k += n;
      if (k == steps) break;
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) M::store_f32(total + (m * NV + v) * L, sums[m][v]);
    }
    if (t.keep || (t.add_partial && plain)) {
      if (t.add_partial) {
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++) sums[m][v] = M::add(sums[m][v], M::load_f32(t.partial + m * COLUMNS + c0 + L * v));
      }
      if (t.keep) {
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++) M::store_f32(t.partial + m * COLUMNS + c0 + L * v, sums[m][v]);
        continue;
      }
    }
    if (plain && t.columns - c0 >= NV * L) {
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) M::store_own(t.out, m * t.ld + c0 + L * v, sums[m][v]);
      continue;
    }
    float buffer[MR * NV * L];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) M::store_f32(buffer + (m * NV + v) * L, sums[m][v]);
    Finish rest = t;
    rest.add_partial = t.add_partial && !plain;
    finish_rows<M>(MR, buffer, c0, rest);
  }
}

template <class M, int MR>
void rank_tile_of(const uint32_t* left, const uint32_t* right, int64_t steps, int columns, float scale, void* out, int64_t ld,
                  DType dtype, float tail_scale, uint32_t* tail) {
  constexpr int L = M::LANES, NV = GROUP / L < M::NV ? GROUP / L : M::NV;
  for (int c0 = 0; c0 < columns; c0 += NV * L) {
    typename M::F sums[MR][NV];
    const int64_t block = M::VALUES == 1 && steps > F32_BLOCK ? F32_BLOCK : steps;
    multiply<M, MR, NV>(left, right + c0, GROUP, block, sums);
    for (int64_t k = block; k < steps; k += block) {
      typename M::F more[MR][NV];
      multiply<M, MR, NV>(left + k * MR, right + c0 + k * GROUP, GROUP, steps - k < block ? steps - k : block, more);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sums[m][v] = M::add(sums[m][v], more[m][v]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const int c = c0 + L * v;
        if (c >= columns) continue;
        store<M>(dtype, out, m * ld + c, M::mul(sums[m][v], M::set1(scale)), columns - c);
        uint32_t dwords[L];
        M::store_left(dwords, M::mul(sums[m][v], M::set1(tail_scale)));
        for (int i = 0; i < L / M::VALUES && M::VALUES * i < columns - c; i++) tail[(c / M::VALUES + i) * MR + m] = dwords[i];
      }
  }
}

template <class M>
void tile(int rows, const uint32_t* left, const uint32_t* right, int64_t steps, const Finish& t) {
  switch (rows) {
    case 1:
      return tile_of<M, 1>(left, right, steps, t);
    case 2:
      return tile_of<M, 2>(left, right, steps, t);
    case 3:
      return tile_of<M, 3>(left, right, steps, t);
    case 4:
      return tile_of<M, 4>(left, right, steps, t);
    case 5:
      return tile_of<M, 5>(left, right, steps, t);
    default:
      return tile_of<M, 6>(left, right, steps, t);
  }
}

template <class M>
void rank_tile(int rows, const uint32_t* left, const uint32_t* right, int64_t steps, int columns, float scale, void* out,
               int64_t ld, DType dtype, float tail_scale, uint32_t* tail) {
  switch (rows) {
    case 1:
      return rank_tile_of<M, 1>(left, right, steps, columns, scale, out, ld, dtype, tail_scale, tail);
    case 2:
      return rank_tile_of<M, 2>(left, right, steps, columns, scale, out, ld, dtype, tail_scale, tail);
    case 3:
      return rank_tile_of<M, 3>(left, right, steps, columns, scale, out, ld, dtype, tail_scale, tail);
    case 4:
      return rank_tile_of<M, 4>(left, right, steps, columns, scale, out, ld, dtype, tail_scale, tail);
    case 5:
      return rank_tile_of<M, 5>(left, right, steps, columns, scale, out, ld, dtype, tail_scale, tail);
    default:
      return rank_tile_of<M, 6>(left, right, steps, columns, scale, out, ld, dtype, tail_scale, tail);
  }
}

// Conversions to float32, a vector at a time.
template <class M>
void convert_f32(DType dtype, const void* src, int64_t n, void* dst_) {
  float* dst = static_cast<float*>(dst_);
  auto run = [&](auto format) {
    using D = decltype(format);
    const typename D::T* s = static_cast<const typename D::T*>(src);
    int64_t i = 0;
    for (; i + M::LANES <= n; i += M::LANES) M::store_f32(dst + i, M::load(D(), s + i));
    for (; i < n; i++) dst[i] = D::load(s[i]);
  };
  if (dtype == DType::f32)
    run(F32());
  else if (dtype == DType::bf16)
    run(BF16());
  else
    run(F16());
}

// Float32 packing where nothing better is written.
[[maybe_unused]] void transpose_f32(const void* src, int64_t ld, int rows, int64_t n, uint32_t* dst, int64_t ld_dst) {
  const uint32_t* s = static_cast<const uint32_t*>(src);
  for (int64_t k = 0; k < n; k++)
    for (int m = 0; m < rows; m++) dst[k * ld_dst + m] = s[m * ld + k];
}

[[maybe_unused]] void interleave_f32(const void* src, int64_t ld, int64_t rows, int columns, uint32_t* dst, int64_t ld_dst,
                                     int64_t group_stride) {
  const uint32_t* s = static_cast<const uint32_t*>(src);
  for (int64_t k = 0; k < rows; k++, s += ld, dst += ld_dst)
    for (int g = 0; g * GROUP < columns; g++)
      for (int c = 0; c < GROUP; c++) dst[g * group_stride + c] = g * GROUP + c < columns ? s[g * GROUP + c] : 0;
}

}  // namespace
}  // namespace lora_kernels::cpu
