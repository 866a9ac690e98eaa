// Level "portable": plain C++, any CPU.
#include "convert.h"

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

}  // namespace
}  // namespace lora_kernels::cpu

#include "kernels_impl.h"

namespace lora_kernels::cpu {
const Kernels portable_kernels = make_kernels("portable", false);
}
