// Double-quantized scales -> float32: code2[absmax_u8] * absmax2, rounded, + offset, rounded.
#include "decode.cuh"

namespace lora_kernels::cuda {

namespace {

constexpr int THREADS = 256;  // one entry of code2 each
constexpr int UNIT = 4 * THREADS;

// A group of 4 scales a thread: they share their absmax2.
__global__ void __launch_bounds__(THREADS) decode_absmax_kernel(Scales scales, float* out, int64_t n_blocks) {
  __shared__ float code2[256];
  code2[threadIdx.x] = scales.code2[threadIdx.x];
  const int64_t first = blockIdx.x * int64_t{UNIT} + 4 * threadIdx.x;
  __syncthreads();
  if (first >= n_blocks) return;
  const int n = static_cast<int>(min(int64_t{4}, n_blocks - first));
  const float absmax2 = scales.absmax2[first >> 8], offset = *scales.offset;
  uint32_t indices = 0;
  if (n == 4)
    indices = *reinterpret_cast<const uint32_t*>(scales.absmax_u8 + first);
  else
    for (int i = 0; i < n; i++) indices |= scales.absmax_u8[first + i] << 8 * i;
  float decoded[4];
#pragma unroll
  for (int i = 0; i < 4; i++) decoded[i] = __fadd_rn(__fmul_rn(code2[indices >> 8 * i & 255], absmax2), offset);
  store_floats(out + first, decoded, n);
}

}  // namespace

void decode_absmax(const Context& context, const Weight& weight, float* out) {
  const int64_t n_blocks = weight.n_blocks();
  const unsigned grid = static_cast<unsigned>(ceil_div(n_blocks, int64_t{UNIT}));
  launch(context, "decode_absmax", decode_absmax_kernel, grid, THREADS, 0, Scales(weight), out, n_blocks);
}

}  // namespace lora_kernels::cuda
