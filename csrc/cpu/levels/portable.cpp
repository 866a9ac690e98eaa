// Level "portable": plain C++, any CPU.
#include "../convert.h"
#include "../loops/dots.h"
#include "../loops/tiles.h"
#include "../loops/weight.h"

namespace lora_kernels::cpu {
namespace {

struct V {
  template <class D>
  static uint32_t abs_bits(const typename D::T* x, int64_t n) {
    uint32_t m = 0;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t u = bits(D::load(x[i])) & 0x7fffffff;
      m = u > m ? u : m;
    }
    return m;
  }

  struct Search {
    float midpoints[15];
    uint8_t order[16];
    Search(const float* m, const uint8_t* o) {
      for (int i = 0; i < 15; i++) midpoints[i] = m[i];
      for (int i = 0; i < 16; i++) order[i] = o[i];
    }
    int find(float v) const {  // how many midpoints are below v
      int i = v > midpoints[7] ? 8 : 0;
      i += v > midpoints[i + 3] ? 4 : 0;
      i += v > midpoints[i + 1] ? 2 : 0;
      return i + (v > midpoints[i] ? 1 : 0);
    }
    template <class D>
    void quantize32(const typename D::T* x, float reciprocal, uint8_t* out) const {
      for (int i = 0; i < 16; i++)
        out[i] = static_cast<uint8_t>(order[find(D::load(x[2 * i]) * reciprocal)] << 4 |
                                      order[find(D::load(x[2 * i + 1]) * reciprocal)]);
    }
  };

  template <class D, class R>
  struct Decoder {
    const float* codebook;
    typename D::T table[16];
    explicit Decoder(const float* c) : codebook(c) {}
    void set(float absmax) {
      for (int i = 0; i < 16; i++) table[i] = D::store(R::load(R::store(codebook[i] * absmax)));
    }
    void store32(const uint8_t* packed, typename D::T* out) const {
      for (int i = 0; i < 16; i++) {
        out[2 * i] = table[packed[i] >> 4];
        out[2 * i + 1] = table[packed[i] & 15];
      }
    }
  };
};

struct MathF32 {
  typedef float F __attribute__((vector_size(16)));
  using W = F;
  using X = F;
  static constexpr int LANES = 4, NV = 2, WIDTH = 16, VALUES = 1;
  static constexpr int NR = 2, DIRECT = 7, DOTS = 16;
  static constexpr DType TYPE = DType::f32;
  static F zero() { return F{0, 0, 0, 0}; }
  static F set1(float v) { return F{v, v, v, v}; }
  static F load_f32(const float* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static F load_some(const float* p, int n) {
    F v = zero();
    for (int i = 0; i < LANES && i < n; i++) v[i] = p[i];
    return v;
  }
  static void store_f32(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static W right(const uint32_t* p) {
    W v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static X broadcast(uint32_t v) { return set1(from_bits(v)); }
  static F dot(F sum, X x, W w) { return sum + x * w; }
  template <class D>
  static F load(D, const typename D::T* p) {
    return F{D::load(p[0]), D::load(p[1]), D::load(p[2]), D::load(p[3])};
  }
  template <class D>
  static void store(D, typename D::T* out, F v, int n) {
    for (int i = 0; i < LANES && i < n; i++) out[i] = D::store(v[i]);
  }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F sum_each(const F (&v)[NR]) {  // in the first NR lanes
    F out = zero();
    for (int j = 0; j < NR; j++) out[j] = (v[j][0] + v[j][1]) + (v[j][2] + v[j][3]);
    return out;
  }
  static void store_own(void* out, int64_t i, F v) { store_f32(static_cast<float*>(out) + i, v); }
};

template <class R>
struct DotsF32 {
  using Math = MathF32;
  using Value = float;
  static constexpr int STEP = 64, SPAN = 8, WAYS = 2;
  struct Code {
    const float* values;
    explicit Code(const float* c) : values(c) {}
  };
  struct Table {
    float values[16];
  };
  static Table table(const Code& code, float absmax, float) {
    Table t;
    for (int i = 0; i < 16; i++) t.values[i] = R::load(R::store(code.values[i] * absmax));
    return t;
  }
  template <bool>
  static Math::F decode(const uint8_t* p, const Table& t, int way) {
    const int shift = way == 0 ? 4 : 0;
    auto value = [&](int i) { return t.values[p[i] >> shift & 15]; };
    return Math::F{value(0), value(1), value(2), value(3)};
  }
};

}  // namespace

constexpr Kernels portable_kernels =
    make_kernels<V, DotsF32>("portable", make_gemm_f32<MathF32, DotsF32>(transpose_f32, interleave_f32));

}  // namespace lora_kernels::cpu
