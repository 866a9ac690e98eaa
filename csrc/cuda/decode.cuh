// 4-bit codes and scales -> values.  Shared by every kernel that reads a quantized weight.
#pragma once
#include "common.cuh"

namespace lora_kernels::cuda {

// The values of the 16 codes, as a kernel argument: that is constant memory, which an instruction reads as an operand.
struct Codebook {
  float value[16];

  explicit Codebook(const Format& format) {
    for (int i = 0; i < 16; i++) value[i] = format.code[i];
  }
};

// The scales of a weight's blocks, as a kernel argument.
struct Scales {
  const float* absmax;  // null when double-quantized
  const uint8_t* absmax_u8;
  const float* absmax2;
  const float* code2;
  const float* offset;

  explicit Scales(const Weight& w)
      : absmax(w.absmax), absmax_u8(w.absmax_u8), absmax2(w.absmax2), code2(w.code2), offset(w.offset) {}

  __device__ float operator[](int64_t block) const { return at(block, code2); }

  // With code2 read from another place, such as a copy in shared memory.  Two roundings, never fused into one.
  __device__ float at(int64_t block, const float* code2_copy) const {
    if (absmax) return absmax[block];
    return __fadd_rn(__fmul_rn(code2_copy[absmax_u8[block]], absmax2[block >> 8]), *offset);
  }
};

// The 4-bit index of element i of 8, in memory order, of which `word` holds the bytes: the high nibble of a byte is first.
__device__ __forceinline__ unsigned nibble(uint32_t word, int i) { return word >> (4 * (i ^ 1)) & 15; }

// round(code * scale) to a 16-bit T for all 16 codes of one block, in 8 registers; looking up 8 elements takes 16 byte
// permutations and some 6 other instructions, building the table 16 multiplications, 8 conversions and 8 permutations.
template <class T>
class Table {
 public:
  __device__ __forceinline__ Table(const Codebook& codebook, float scale) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* code = codebook.value + 4 * i;
      const uint32_t first = pack2<T>(__fmul_rn(code[0], scale), __fmul_rn(code[1], scale));
      const uint32_t second = pack2<T>(__fmul_rn(code[2], scale), __fmul_rn(code[3], scale));
      low_[i] = __byte_perm(first, second, 0x6420);
      high_[i] = __byte_perm(first, second, 0x7531);
    }
  }

  // 8 elements in memory order, two a register, from the 4 bytes in `word`.
  __device__ __forceinline__ void decode(uint32_t word, uint32_t (&out)[4]) const {
    const uint32_t among_8 = word & 0x77777777;                         // the code within its half of the table
    const uint32_t which_half = (word >> 1 & 0x44444444) | 0x32103210;  // and the half: byte j of the first or second lookup
#pragma unroll
    for (int i = 0; i < 2; i++) {  // 4 codes at a time
      const uint32_t index = among_8 >> 16 * i, half = which_half >> 16 * i;
      const uint32_t low = look_up(low_, index, half), high = look_up(high_, index, half);
      out[2 * i] = __byte_perm(low, high, 0x4051);  // the second code of a byte is in its low nibble
      out[2 * i + 1] = __byte_perm(low, high, 0x6273);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t look_up(const uint32_t (&plane)[4], uint32_t index, uint32_t half) {
    return __byte_perm(__byte_perm(plane[0], plane[1], index), __byte_perm(plane[2], plane[3], index), half);
  }

  uint32_t low_[4], high_[4];  // low and high bytes of the 16 values
};

}  // namespace lora_kernels::cuda
