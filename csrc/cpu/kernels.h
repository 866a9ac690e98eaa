// The inner loops, one set per instruction-set level, and the choice among them.  Included by files that are compiled with
// AVX flags: nothing but <cstdint> may come in here, or the linker may keep an AVX copy of somebody's inline function.
#pragma once
#include <cstdint>

#include "../dtype.h"

namespace lora_kernels::cpu {

constexpr int MAX_ROWS = 64;   // of the left operand in a tile, of any kernel
constexpr int COLUMNS = 64;    // of the right operand in a panel, and the row length of float32 tiles
constexpr int F32_BLOCK = 64;  // steps of a float32 sum before it joins the total: its error grows with their square root
constexpr int GROUP = 16;      // columns that are packed together
constexpr int RANKS = 4;       // rows of lora_A that are multiplied together with a few rows of x
constexpr int MAX_DOTS = 16;   // rows of x that any level counts as few

// What becomes of the sums of a tile [rows, columns].
struct Finish {
  float* partial;     // [rows, COLUMNS] sums carried between blocks of the contraction
  bool add_partial;   // to the sums
  bool keep;          // the sums go to `partial`, the rest is ignored
  const float* bias;  // [columns] or null
  void* out;          // [rows, columns] of `dtype`, rows ld apart
  int64_t ld;
  DType dtype;
  int columns;
};

// A left operand [rows, steps]: dwords from one row and from one step to the next, {ld, 1} where it is row-major.
struct Strided {
  const uint32_t* data;
  int64_t row, step;
};

// A stretch of a contraction.
struct LeftPart {
  Strided left;
  int64_t steps;
};

// A matrix product: left [rows, D] by steps, right [D, columns] packed as [steps][`width`] dwords.  A dword is one step of the
// contraction: a float32, or two bf16 that are neighbours along it (an odd length is padded with zero).
struct Gemm {
  int values;      // in a dword: 1 or 2
  int width;       // columns of the right operand side by side in memory; a panel is COLUMNS / width such pieces
  int rows;        // of the left operand in a tile, at most
  int grain;       // the rows of a tile are a multiple of it, a power of two; the rest are one last, smaller tile
  bool row_major;  // every left operand is; else packed tiles are {1, rows}

  // src [n] of `dtype` -> the type that is multiplied.
  void (*convert)(DType dtype, const void* src, int64_t n, void* dst);
  // src [rows <= 16, n], rows ld values apart -> dst [steps of n][rows], steps ld_dst dwords apart.
  void (*transpose)(const void* src, int64_t ld, int rows, int64_t n, uint32_t* dst, int64_t ld_dst);
  // src [rows, columns <= 64], rows ld values apart -> dst [steps of rows][columns, padded with zero to whole groups],
  // steps ld_dst and groups group_stride dwords apart.
  void (*interleave)(const void* src, int64_t ld, int64_t rows, int columns, uint32_t* dst, int64_t ld_dst,
                     int64_t group_stride);
  // Parts [rows, steps] side by side x right [steps of all][width] -> finish.  columns <= width.
  void (*tile)(int rows, const LeftPart* parts, int n_parts, const uint32_t* right, const Finish& finish);
  // left [rows, steps] x right [steps][16]: scale * sums -> out [rows, columns <= 16] of `dtype`, and tail_scale * sums ->
  // tail [rows, columns] of the type that is multiplied; rows ld and tail_ld values apart.
  void (*rank_tile)(int rows, const LeftPart& left, const uint32_t* right, int columns, float scale, void* out, int64_t ld,
                    DType dtype, float tail_scale, void* tail, int64_t tail_ld);

  // scale * src [n] -> dst of `dtype`
  void (*store)(const float* src, int64_t n, float scale, DType dtype, void* dst);

  // x [M <= MAX_DOTS, K], of the type that is multiplied, a [rows <= RANKS, K]^T of `dtype` -> out [M, RANKS]; K a multiple
  // of 64
  void (*rank_dots)(const void* x, int M, int64_t K, DType dtype, const void* a, int rows, float* out);
  // Rows of x up to which `dots` is faster than the packed product.
  int few;
  // x [n] in the order that `dots` takes it, padded with zeros to a multiple of `step`, steps step_to_step values apart.
  int step;
  void (*split)(const void* x, int64_t n, void* dst, int64_t step_to_step);

  // W [N, K] decoded straight into the packed layout; null where only the general way exists.  K, k0, k1 multiples of 32.
  // Rows [n0, n0 + 16), columns [k0, k1) -> dst [steps of k][16], steps ld_dst dwords apart.
  void (*decode_rows)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t K, int64_t n0,
                      int64_t k0, int64_t k1, uint32_t* dst, int64_t ld_dst);
  // Rows [n0, n1), columns [k0, k0 + columns), columns 32 or 64 -> dst [steps of n][columns].
  void (*decode_columns)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t K, int64_t n0,
                         int64_t n1, int64_t k0, int columns, uint32_t* dst, int64_t ld_dst);
  // What a thread does after its last tile, or null.
  void (*release)();
};

// The product of a few rows: x as it lies in memory against decoded rows of W, a sum of each pair.  K a multiple of 64, blocks
// of at least 64.
struct Dots {
  const uint8_t *packed, *end;  // all of W
  const float* codebook;
  const float* absmax;  // of every 64 weights from row n0 on
  int64_t K, N;
  int M;
  const void* x;      // [steps of K][M][a Gemm's `step`], its type, split
  int64_t rank;       // r rounded up to a multiple of GROUP
  const float* h;     // [M, rank] scaled, zero past r
  const float* B;     // [n1 - n0, rank], zero past r
  const float* bias;  // [n1 - n0] or null
  void* y;            // [M, N]
  DType dtype;
};

struct Kernels {
  const char* name;
  Gemm f32;
  Gemm bf16;  // all null where the CPU does not multiply bf16: it converts inside, at a third of the speed of float32
  // Gives bf16 with the tiles of a library.  Null at levels that never use one; gives null while the library is switched off.
  const Gemm* (*library)();

  // Full blocks [b0, b1) of x (dtype by suffix) -> packed, absmax.  midpoints [15] ascending; order [16]: sorted position ->
  // 4-bit index.  False if a value is not finite.
  bool (*quantize_f32)(const void* x, int64_t b0, int64_t b1, int64_t blocksize, const float* midpoints, const uint8_t* order,
                       uint8_t* packed, float* absmax);
  bool (*quantize_f16)(const void* x, int64_t b0, int64_t b1, int64_t blocksize, const float* midpoints, const uint8_t* order,
                       uint8_t* packed, float* absmax);
  bool (*quantize_bf16)(const void* x, int64_t b0, int64_t b1, int64_t blocksize, const float* midpoints, const uint8_t* order,
                        uint8_t* packed, float* absmax);

  // out[i - i0] = code2[absmax_u8[i]] * absmax2[i / 256] + offset for i in [i0, i1), two roundings.
  void (*decode_absmax)(const uint8_t* absmax_u8, const float* absmax2, const float* code2, float offset, int64_t i0,
                        int64_t i1, float* out);

  // Elements [e0, e1) of the flattened weight -> out[0 .. e1 - e0).  codebook [16], absmax [n_blocks], blocks of 1 << shift.
  // The suffix names the dtype a value is rounded to; `as_f32` stores it widened back to float32.
  void (*decode_f32)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0, int64_t e1,
                     void* out);
  void (*decode_f16)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0, int64_t e1,
                     void* out);
  void (*decode_bf16)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0, int64_t e1,
                      void* out);
  void (*decode_f16_as_f32)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0,
                            int64_t e1, void* out);
  void (*decode_bf16_as_f32)(const uint8_t* packed, const float* codebook, const float* absmax, int shift, int64_t e0,
                             int64_t e1, void* out);

  // Rows [n0, n1) of W, rounded to the dtype in the name, and of the output; bf16 takes x of that type where the CPU has it.
  void (*dots_f32)(const Dots& dots, int64_t n0, int64_t n1);
  void (*dots_f16)(const Dots& dots, int64_t n0, int64_t n1);
  void (*dots_bf16)(const Dots& dots, int64_t n0, int64_t n1);

  // out[i] = value[i] where element e0 + i of the mask is kept, else 0.  Philox 4x32-10: key = seed, counter = element / 4,
  // word = element % 4, kept when word >= threshold.
  void (*drop_f32)(const float* value, uint64_t seed, uint64_t threshold, int64_t e0, int64_t n, float* out);
};

// The kernels of the best level that this CPU has, or of the one that LORA_KERNELS_CPU_ISA names.
// Throws std::invalid_argument if that is unknown or not supported here.
const Kernels& kernels();
constexpr int MAX_LEVELS = 5;
// Levels this CPU supports, best first; returns how many.
int supported_levels(const Kernels* out[MAX_LEVELS]);

extern const Kernels portable_kernels;
#ifdef LORA_KERNELS_X86
extern const Kernels avx2_kernels, avx512_kernels, avx512bf16_kernels;
// Those of avx512bf16, with the tiles of torch's oneDNN; null where it has none.
const Kernels* amx_kernels();
// Whether those tiles use AMX.
bool has_amx();
#endif

}  // namespace lora_kernels::cpu
