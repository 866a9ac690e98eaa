// weight -> 4-bit codes and scales, bit for bit what bitsandbytes computes: csrc/cpu/quantize.cpp says how it is defined.
#include "decode.cuh"

namespace lora_kernels::cuda {

namespace {

constexpr int THREADS = 256;

// What of a format it takes to write a code, as a kernel argument.
struct Midpoints {
  float value[15];
  uint64_t order = 0;  // sorted position -> 4-bit index, a nibble each

  explicit Midpoints(const Format& format) {
    for (int i = 0; i < 15; i++) value[i] = format.midpoints[i];
    for (int i = 0; i < 16; i++) order |= uint64_t{format.order[i]} << 4 * i;
  }
};

// How many of the ascending 2^n - 1 values lie below v.
template <int n>
__device__ __forceinline__ unsigned count_below(const float* ascending, float v) {
  unsigned i = 0;
#pragma unroll
  for (unsigned step = 1u << (n - 1); step; step /= 2)
    if (ascending[i + step - 1] < v) i += step;
  return i;
}

// The bits of |v| order as its values do, and those of infinity and NaN come last.
__device__ __forceinline__ unsigned magnitude(float v) { return __float_as_uint(v) & 0x7fffffff; }

// A thread takes 8 elements at a time, and a group of `lanes` threads a block: it finds the maximum, then reads the block again
// (from the cache, or not at all where 8 elements a thread are the whole block) and writes 4 bytes of codes a thread.
template <class T>
__global__ void __launch_bounds__(THREADS)
    quantize_kernel(const T* weight, int64_t numel, const __grid_constant__ Midpoints midpoints, int blocksize, int lanes,
                    uint8_t* packed, float* absmax, int32_t* bad) {
  __shared__ float midpoint[15];
  if (threadIdx.x < 15) midpoint[threadIdx.x] = midpoints.value[threadIdx.x];
  __syncthreads();
  const int64_t block = (blockIdx.x * int64_t{THREADS} + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes;
  const int64_t first = block * blocksize;
  const int size = static_cast<int>(max(int64_t{0}, min(int64_t{blocksize}, numel - first)));

  float v[8];
  auto load = [&](int i) {
    constexpr int N = VECTOR<T>;
    for (int j = 0; j < 8; j += N) {
      float part[N];
      load_floats(weight + first + i + j, part, size - i - j);
#pragma unroll
      for (int k = 0; k < N; k++) v[j + k] = part[k];
    }
  };
  unsigned largest = 0;
  for (int i = 8 * lane; i < size; i += 8 * lanes) {
    load(i);
#pragma unroll
    for (int j = 0; j < 8; j++) largest = max(largest, magnitude(v[j]));
  }
  for (int distance = lanes / 2; distance; distance /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
  if (size == 0) return;

  // bitsandbytes multiplies by the reciprocal in a full block and divides in a short one.
  const bool full = size == blocksize;
  const float scale = __uint_as_float(largest), divisor = fmaxf(scale, 1e-38f), reciprocal = __frcp_rn(divisor);
  if (lane == 0) {
    absmax[block] = full ? scale : divisor;
    if (largest >= 0x7f800000) *bad = 1;
  }
  for (int i = 8 * lane; i < size; i += 8 * lanes) {
    if (blocksize > 8 * lanes) load(i);
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float scaled = full ? __fmul_rn(v[j], reciprocal) : __fdiv_rn(v[j], divisor);
      const unsigned code = static_cast<unsigned>(midpoints.order >> 4 * count_below<4>(midpoint, scaled)) & 15;
      word |= code << 4 * (j ^ 1);  // the first of two codes is the high nibble of its byte
    }
    uint8_t* target = packed + (first + i) / 2;
    if (size - i >= 8)
      *reinterpret_cast<uint32_t*>(target) = word;
    else
      for (int j = 0; 2 * j < size - i; j++) target[j] = static_cast<uint8_t>(word >> 8 * j);
  }
}

// 256 scales a block of threads.  bitsandbytes looks for the nearest entry of code2 through 65536 equal steps of [-1, 1].
__global__ void __launch_bounds__(256) quantize_absmax_kernel(const float* absmax, int64_t n_blocks, const float* offset,
                                                              const float* code2, uint8_t* absmax_u8, float* absmax2) {
  __shared__ float midpoint[255];
  __shared__ unsigned warp_largest[8];
  const int thread = threadIdx.x;
  if (thread < 255) midpoint[thread] = __fmul_rn(0.5f, __fadd_rn(code2[thread], code2[thread + 1]));
  const int64_t i = blockIdx.x * int64_t{256} + thread;
  const float v = i < n_blocks ? __fsub_rn(absmax[i], *offset) : 0.0f;
  unsigned largest = magnitude(v);
  for (int distance = WARP / 2; distance; distance /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
  if (thread % WARP == 0) warp_largest[thread / WARP] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < 8; w++) largest = max(largest, warp_largest[w]);
  const float scale = __uint_as_float(largest);
  if (thread == 0) absmax2[blockIdx.x] = scale;
  if (i >= n_blocks) return;
  const float clamped = fminf(1.0f, fmaxf(-1.0f, __fmul_rn(v, __frcp_rn(scale))));
  const int step = static_cast<int>(__fmaf_rn(__fmul_rn(__fadd_rn(clamped, 1.0f), 0.5f), 65535.0f, 0.5f));
  const float on_step = __fadd_rn(-1.0f, __fdiv_rn(2.0f * step, 65535.0f));
  absmax_u8[i] = scale == 0 ? 0 : static_cast<uint8_t>(count_below<8>(midpoint, on_step));
}

}  // namespace

void quantize(const Context& context, Dense weight, int64_t numel, const Format& format, int64_t blocksize, uint8_t* packed,
              float* absmax, int32_t* bad) {
  const int lanes = static_cast<int>(std::min(int64_t{WARP}, blocksize / 8));
  const int64_t n_blocks = ceil_div(numel, blocksize);
  dispatch(weight.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(context, "quantize", quantize_kernel<T>, static_cast<unsigned>(ceil_div(n_blocks * lanes, int64_t{THREADS})),
           THREADS, 0, static_cast<const T*>(weight.data), numel, Midpoints(format), static_cast<int>(blocksize), lanes, packed,
           absmax, bad);
  });
}

void quantize_absmax(const Context& context, const float* absmax, int64_t n_blocks, const float* offset, const float* code2,
                     uint8_t* absmax_u8, float* absmax2) {
  launch(context, "quantize_absmax", quantize_absmax_kernel, static_cast<unsigned>(ceil_div(n_blocks, int64_t{256})), 256, 0,
         absmax, n_blocks, offset, code2, absmax_u8, absmax2);
}

}  // namespace lora_kernels::cuda
