// The functions of csrc/cuda/ptx.cuh, written after the fragment layouts of the PTX manual.
#pragma once
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace lora_kernels::cuda {

inline unsigned char* dynamic_shared() { return ::emulator::dynamic_shared(); }

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Slot {
    uint32_t a[4], b[2];
    float c[4];
  };
  auto element = [](uint32_t pair, int i) {
    const uint16_t bits = static_cast<uint16_t>(pair >> 16 * i);
    if constexpr (std::is_same_v<T, __half>) {
      __half h;
      std::memcpy(&h, &bits, 2);
      return __half2float(h);
    } else {
      return __bfloat162float({bits});
    }
  };
  Slot slot = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  slot = ::emulator::collective("mma", 0xffffffff, slot, [&](Slot* lanes) {
    float A[16][16], B[8][16];  // B transposed
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 2; i++) {
        const int g = lane / 4, k = lane % 4 * 2 + i;
        for (int j = 0; j < 4; j++) A[g + j % 2 * 8][k + j / 2 * 8] = element(lanes[lane].a[j], i);
        for (int j = 0; j < 2; j++) B[g][k + j * 8] = element(lanes[lane].b[j], i);
      }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const float *row = A[lane / 4 + i / 2 * 8], *column = B[lane % 4 * 2 + i % 2];
        float& sum = lanes[lane].c[i];
        for (int k = 0; k < 16; k++) sum += row[k] * column[k];
      }
  });
  for (int i = 0; i < 4; i++) c[i] = slot.c[i];
}

template <bool transposed>
void emulated_ldmatrix(uint32_t (&r)[4], const void* row) {
  struct Slot {
    const uint16_t* row;
    uint32_t r[4];
  };
  if (reinterpret_cast<uintptr_t>(row) % 16) ::emulator::fail("ldmatrix: a row is not aligned to 16 bytes");
  const Slot slot =
      ::emulator::collective("ldmatrix", 0xffffffff, Slot{static_cast<const uint16_t*>(row), {}}, [](Slot* lanes) {
        for (int lane = 0; lane < 32; lane++)
          for (int i = 0; i < 4; i++) {
            const int g = lane / 4, t = lane % 4 * 2;
            auto element = [&](int row, int column) { return uint32_t{lanes[8 * i + row].row[column]}; };
            lanes[lane].r[i] = transposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
          }
      });
  for (int i = 0; i < 4; i++) r[i] = slot.r[i];
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulated_ldmatrix<false>(r, row); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) { emulated_ldmatrix<true>(r, row); }

inline void cp_async_16(void* shared, const void* global, bool valid = true) { ::emulator::copy_later(shared, global, valid); }
inline void cp_async_commit() { ::emulator::commit_copies(); }
template <int pending>
void cp_async_wait() {
  ::emulator::wait_for_copies(pending);
}

}  // namespace lora_kernels::cuda
