// Every native op, declared once: plain pointers, row-major contiguous.  M tokens, N outputs, K inputs, r the adapter's rank.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "dtype.h"
#include "formats.h"

namespace lora_kernels {

inline int64_t itemsize(DType t) { return t == DType::f32 ? 4 : 2; }

// A dense tensor whose dtype is known at run time.
struct Dense {
  const void* data;  // null where an optional argument is absent
  DType dtype;
};

// A 4-bit weight as bitsandbytes stores it; blocks run over the flattened [N, K].
struct Weight {
  const uint8_t* packed;     // [ceil(numel / 2)]
  const float* absmax;       // [n_blocks], or null when double-quantized
  const uint8_t* absmax_u8;  // [n_blocks] indices into code2, or null, as all that follows
  const float* absmax2;      // [ceil(n_blocks / 256)]
  const float* code2;        // [256]
  const float* offset;       // [1]
  int64_t N, K;              // for the linear ops; elsewhere N = 1 and K = numel
  int64_t blocksize;         // a power of two, 32 to 4096
  const Format* format;      // null where no codes are read

  int64_t numel() const { return N * K; }
  int shift() const {  // a block is 1 << shift elements
    int s = 0;
    while ((int64_t{1} << s) < blocksize) s++;
    return s;
  }
  int64_t n_blocks() const { return (numel() + blocksize - 1) / blocksize; }
};

struct Adapter {
  Dense A;    // [r, K]
  Dense B;    // [N, r]
  int64_t r;  // 0 without adapter
  float scaling;
  double dropout_p;
  const int64_t* seed;  // [1], null without dropout
};

namespace cpu {

// weight [numel] -> packed [ceil(numel / 2)], absmax [n_blocks].  Returns false, with the outputs unspecified, if the weight
// holds NaN or infinity.
bool quantize(Dense weight, int64_t numel, const Format& format, int64_t blocksize, uint8_t* packed, float* absmax);

// absmax [n_blocks] - offset -> absmax_u8 [n_blocks] indices into code2 [256], absmax2 [ceil(n_blocks / 256)].
void quantize_absmax(const float* absmax, int64_t n_blocks, float offset, const float* code2, uint8_t* absmax_u8,
                     float* absmax2);

// out [n_blocks] = code2[absmax_u8] * absmax2, rounded, + offset, rounded.
void decode_absmax(const Weight& weight, float* out);

// out [numel] = code * absmax, rounded once to dtype.
void dequantize(const Weight& weight, DType dtype, void* out);

// A layer on x [M, K]: y [M, N] = x W^T + s h B^T + bias,  h [M, r] = dropout(x) A^T, both of the dtype of x; bias [N].
struct Layer {
  Weight weight;
  Adapter adapter;
  Dense bias;
  void *y, *h;
};

// Several layers on one x, of one K.
void qlora_linear(DType dtype, int64_t M, const void* x, const std::vector<Layer>& layers);

// What a layer gives back for dy [M, N], with h [M, r], both of the dtype of x.  Outputs that are null are not computed; with
// g = dy B [M, r]:
//   dA [r, K] of A's dtype = s g^T dropout(x)
//   dB [N, r] of B's dtype = s dy^T h
//   dbias [N] float32 = sum of dy over M
struct LayerGradients {
  Weight weight;
  Adapter adapter;
  const void *dy, *h;
  void *dA, *dB;
  float* dbias;
};

// dx [M, K] of `dtype`, null where it is not wanted: the sum over the layers of dy W + dropout(s g A), rounded once.
void qlora_linear_backward(DType dtype, int64_t M, const void* x, const std::vector<LayerGradients>& layers, void* dx);

}  // namespace cpu

// Every pointer is one of the device, and the launches go to a stream: nothing here waits for it.
namespace cuda {

// What an op gets from its caller besides its arguments.
struct Context {
  void* stream;                                   // a cudaStream_t of the current device
  std::function<void*(int64_t bytes)> workspace;  // memory that lives until the launched work has run, aligned to 256 bytes
  int32_t* counters;                              // [COUNTERS] zeros, of this stream alone; every op leaves zeros
};
inline constexpr int COUNTERS = 16384;

// Why the runtime finds no device, or an empty string.
std::string problem();

// What follows runs on this device.
void set_device(int device);

// As in `cpu`; `bad` [1], zero on entry, becomes nonzero where cpu::quantize returns false.
void quantize(const Context& context, Dense weight, int64_t numel, const Format& format, int64_t blocksize, uint8_t* packed,
              float* absmax, int32_t* bad);

void quantize_absmax(const Context& context, const float* absmax, int64_t n_blocks, const float* offset, const float* code2,
                     uint8_t* absmax_u8, float* absmax2);

void decode_absmax(const Context& context, const Weight& weight, float* out);

// Elements [begin, end) of the weight; begin is a multiple of 32.
void dequantize(const Context& context, const Weight& weight, int64_t begin, int64_t end, DType dtype, void* out);

// x [M, K] -> y [M, N], h [M, r], as in `cpu`.  Without `product` x W^T and dy W are left out: y = s h B^T + bias,
// dx = dropout(s g A), for a caller that adds them.
void qlora_linear(const Context& context, DType dtype, int64_t M, const void* x, const Weight& weight, const Adapter& adapter,
                  Dense bias, void* y, void* h, bool product);

// Outputs that are null are not computed.  dx is of `dtype`, or float32 and added to what is there (`accumulate_dx`).
void qlora_linear_backward(const Context& context, DType dtype, int64_t M, const void* dy, const void* x, const void* h,
                           const Weight& weight, const Adapter& adapter, bool accumulate_dx, void* dx, void* dA, void* dB,
                           float* dbias, bool product);

}  // namespace cuda
}  // namespace lora_kernels
