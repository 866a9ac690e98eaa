// Level "amx": level "avx512bf16" with the tiles of oneDNN's brgemm, which use AMX where the CPU has it.
#ifdef LORA_KERNELS_X86
#include <exception>

#include "../from_torch.h"
#include "../kernels.h"

namespace lora_kernels::cpu {

namespace {

const Gemm& own = avx512bf16_kernels.bf16;

// left [rows, steps] x right [steps][columns] -> sums [rows, columns], or added to them
void brgemm(int rows, const LeftPart& left, const uint32_t* right, int columns, bool add, float* sums) {
  torch::brgemm(rows, columns, 2 * left.steps, 2 * left.left.row, add, reinterpret_cast<const uint16_t*>(left.left.data), right,
                sums);
}

// Of a product of bf16 the outputs are bf16.
void tile(int rows, const LeftPart* parts, int n_parts, const uint32_t* right, const Finish& t) {
  alignas(64) float buffer[MAX_ROWS * COLUMNS];
  float* sums = t.partial ? t.partial : buffer;
  for (int i = 0; i < n_parts; right += parts[i++].steps * COLUMNS)
    brgemm(rows, parts[i], right, COLUMNS, t.add_partial || i, sums);
  if (t.keep) return;
  for (int m = 0; m < rows; m++, sums += COLUMNS) {
    if (t.bias)
      for (int c = 0; c < t.columns; c++) sums[c] += t.bias[c];
    own.store(sums, t.columns, 1, t.dtype, static_cast<uint16_t*>(t.out) + m * t.ld);
  }
}

void rank_tile(int rows, const LeftPart& left, const uint32_t* right, int columns, float scale, void* out, int64_t ld,
               DType dtype, float tail_scale, void* tail, int64_t tail_ld) {
  alignas(64) float buffer[MAX_ROWS * GROUP];
  brgemm(rows, left, right, GROUP, false, buffer);
  for (int m = 0; m < rows; m++) {
    const float* sums = buffer + m * GROUP;
    own.store(sums, columns, scale, dtype, static_cast<uint16_t*>(out) + m * ld);
    own.store(sums, columns, tail_scale, DType::bf16, static_cast<uint16_t*>(tail) + m * tail_ld);
  }
}

// brgemm keeps a kernel for every shape, and the tile registers as the last one needs them.
void release() { torch::brgemm_release(); }

Gemm make_gemm() {
  Gemm g = own;
  g.rows = MAX_ROWS;
  g.grain = 16;  // rows of a tile register
  g.row_major = true;
  g.tile = tile;
  g.rank_tile = rank_tile;
  g.release = release;
  return g;
}

const Gemm* enabled() {
  static const Gemm gemm = make_gemm();
  return torch::onednn_enabled() ? &gemm : nullptr;
}

// Only a call tells: torch may have been built without it.
bool works() {
  try {
    const uint32_t zeros[GROUP] = {};
    float sums[GROUP];
    brgemm(1, {{zeros, 1, 1}, 1}, zeros, GROUP, false, sums);
    release();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

bool has_amx() { return torch::brgemm_uses_amx(); }

const Kernels* amx_kernels() {
  static const bool available = works();
  static const Kernels kernels = [] {
    Kernels k = avx512bf16_kernels;
    k.name = "amx";
    k.library = enabled;
    return k;
  }();
  return available ? &kernels : nullptr;
}

}  // namespace lora_kernels::cpu
#endif
