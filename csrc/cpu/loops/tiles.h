// The tiles of the packed matrix product, over a struct M that says how one instruction-set level multiplies:
//   M::F, M::W, M::X        vectors of LANES sums, of LANES right operands, and of one left operand in every lane
//   M::LANES, M::NV         values in a vector, and vectors side by side in a tile
//   M::WIDTH                columns of the right operand that lie side by side in memory
//   M::VALUES, M::TYPE      steps of the contraction in a dword (1 or 2), and the dtype that is multiplied
//   zero, set1, load_f32, store_f32, add, mul                 on vectors of sums
//   right(dwords), broadcast(dword), dot(sum, x, w)           operands, and sum + x w
//   load(D, p), load_some(p, n), store(D, out, v, n)          a whole vector; the first n lanes of one
//   store_own(out, i, v)                                      a whole vector to values of TYPE, from the i-th on
#pragma once
#include "../convert.h"
#include "../kernels.h"

namespace lora_kernels::cpu {
namespace {

constexpr int ROWS = 6;         // of a tile, at most
constexpr int64_t AHEAD = 256;  // steps of a packed left operand between its prefetch and its use

// sums += left [MR, steps] x right [steps][ld]
template <class M, int MR, int NV>
inline __attribute__((always_inline)) void multiply(Strided left, int64_t steps, const uint32_t* __restrict right, int64_t ld,
                                                    typename M::F (&sums)[MR][NV]) {
  const uint32_t* __restrict rows[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) rows[m] = left.data + m * left.row;
  const int64_t step = left.step;
  int64_t k = 0;
  if constexpr (NV == 1) {  // bound by the latency of the additions: even and odd steps apart
    typename M::F odd[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) odd[m] = M::zero();
    for (; k + 2 <= steps; k += 2, right += 2 * ld) {
      const typename M::W w0 = M::right(right), w1 = M::right(right + ld);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        sums[m][0] = M::dot(sums[m][0], M::broadcast(rows[m][k * step]), w0);
        odd[m] = M::dot(odd[m], M::broadcast(rows[m][k * step + step]), w1);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) sums[m][0] = M::add(sums[m][0], odd[m]);
  }
  auto advance = [&](int64_t end) __attribute__((always_inline)) {
#pragma GCC unroll 1
    for (; k < end; k++, right += ld) {
      typename M::W w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) w[v] = M::right(right + M::LANES * v);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const typename M::X x = M::broadcast(rows[m][k * step]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sums[m][v] = M::dot(sums[m][v], x, w[v]);
      }
    }
  };
  // Prefetch by hand: 16 steps of a packed tile are MR cache lines.  Where the operand is larger than this core's share of L3,
  // they come from memory, and the hardware's own prefetch stops at every page.
  if (step == MR)
    while (k + 16 <= steps) {
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) __builtin_prefetch(left.data + (k + AHEAD) * MR + 16 * m);
      advance(k + 16);
    }
  advance(steps);
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

// The slow way out of a tile: sums [rows, NV vectors], which wait in memory, plus partial sums and bias where there are any,
// are rounded and stored, any number of columns of any dtype.  Kept out of line, so that the usual ways (`tile_of`: whole
// vectors of M::TYPE without a bias, or sums that are only carried on) keep their sums in registers.
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
      store<M>(t.dtype, t.out, m * t.ld + c, s, t.columns - c);
    }
}

// Rows of the output, for writing: they have come when the sums are done.
inline void prefetch_rows(int rows, const Finish& t, int c0, int columns) {
  const int64_t size = t.dtype == DType::f32 ? 4 : 2;
  for (int m = 0; m < rows; m++)
    for (int64_t b = 0; b < columns * size; b += 64)
      __builtin_prefetch(static_cast<const char*>(t.out) + (m * t.ld + c0) * size + b, 1);
}

template <class M, int MR, int NV>
inline void clear(typename M::F (&sums)[MR][NV]) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sums[m][v] = M::zero();
}

// sums = parts x right.  Of float32, a block of steps is summed apart.
template <class M, int MR, int NV>
inline __attribute__((always_inline)) void product(const LeftPart* parts, int n_parts, const uint32_t* right, int64_t ld,
                                                   typename M::F (&sums)[MR][NV]) {
  constexpr int L = M::LANES;
  clear<M>(sums);
  if constexpr (M::VALUES == 2) {
    for (const LeftPart* p = parts; p < parts + n_parts; right += p->steps * ld, p++)
      multiply<M>(p->left, p->steps, right, ld, sums);
  } else {
    float total[MR * NV * L];
    bool first = true;
    for (const LeftPart* p = parts; p < parts + n_parts; p++)
      for (int64_t k = 0, n; k < p->steps; k += n, right += n * ld) {
        n = p->steps - k < F32_BLOCK ? p->steps - k : F32_BLOCK;
        if (!first) {
#pragma GCC unroll 8
          for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) M::store_f32(total + (m * NV + v) * L, sums[m][v]);
          clear<M>(sums);
        }
        multiply<M>({p->left.data + k * p->left.step, p->left.row, p->left.step}, n, right, ld, sums);
        if (!first) {
#pragma GCC unroll 8
          for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) sums[m][v] = M::add(sums[m][v], M::load_f32(total + (m * NV + v) * L));
        }
        first = false;
      }
  }
}

template <class M, int MR>
void tile_of(const LeftPart* parts, int n_parts, const uint32_t* right, const Finish& t) {
  constexpr int L = M::LANES, NV = M::NV;
  const bool plain = t.dtype == M::TYPE && !t.bias;
  for (int c0 = 0; c0 < t.columns; c0 += NV * L) {
    typename M::F sums[MR][NV];
    if (!t.keep) prefetch_rows(MR, t, c0, NV * L);
    product<M>(parts, n_parts, right + c0, M::WIDTH, sums);
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
void rank_tile_of(const LeftPart& left, const uint32_t* right, int columns, float scale, void* out, int64_t ld, DType dtype,
                  float tail_scale, void* tail, int64_t tail_ld) {
  constexpr int L = M::LANES, NV = GROUP / L < M::NV ? GROUP / L : M::NV;
  for (int c0 = 0; c0 < columns; c0 += NV * L) {
    typename M::F sums[MR][NV];
    product<M>(&left, 1, right + c0, GROUP, sums);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const int c = c0 + L * v;
        if (c >= columns) continue;
        store<M>(dtype, out, m * ld + c, M::mul(sums[m][v], M::set1(scale)), columns - c);
        store<M>(M::TYPE, tail, m * tail_ld + c, M::mul(sums[m][v], M::set1(tail_scale)), columns - c);
      }
  }
}

template <int N>
struct Rows {
  static constexpr int count = N;
};

template <class F>
inline void with_rows(int rows, const F& f) {
  switch (rows) {
    case 1:
      return f(Rows<1>());
    case 2:
      return f(Rows<2>());
    case 3:
      return f(Rows<3>());
    case 4:
      return f(Rows<4>());
    case 5:
      return f(Rows<5>());
    default:
      return f(Rows<ROWS>());
  }
}

template <class M>
void tile(int rows, const LeftPart* parts, int n_parts, const uint32_t* right, const Finish& t) {
  with_rows(rows, [&](auto n) { tile_of<M, decltype(n)::count>(parts, n_parts, right, t); });
}

template <class M>
void rank_tile(int rows, const LeftPart& left, const uint32_t* right, int columns, float scale, void* out, int64_t ld,
               DType dtype, float tail_scale, void* tail, int64_t tail_ld) {
  with_rows(rows, [&](auto n) {
    rank_tile_of<M, decltype(n)::count>(left, right, columns, scale, out, ld, dtype, tail_scale, tail, tail_ld);
  });
}

template <class M>
void scale_store(const float* src, int64_t n, float scale, DType dtype, void* dst) {
  for (int64_t i = 0; i < n; i += M::LANES) {
    const int left = static_cast<int>(n - i < M::LANES ? n - i : M::LANES);
    store<M>(dtype, dst, i, M::mul(M::load_some(src + i, left), M::set1(scale)), left);
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
