// 4-bit weight -> dense: code * absmax in float32, rounded once to T; double-quantized scales are decoded on the way.
//
// A block of threads reads 4 KB of packed bytes, 16 a thread, and the scales of these 8192 elements into shared memory, so that
// afterwards consecutive threads write consecutive 16 bytes whatever T is.  The codebook is in shared memory too: its 16 words
// lie in 16 banks, and so no two lanes ever collide.
#include "decode.cuh"

namespace lora_kernels::cuda {

namespace {

constexpr int THREADS = 256;
constexpr int UNIT = 32 * THREADS;  // elements

template <class T>
__global__ void __launch_bounds__(THREADS)
    dequantize_kernel(const uint8_t* packed, Scales scales, const __grid_constant__ Codebook codebook, int shift, int64_t begin,
                      int64_t end, T* out) {
  __shared__ uint4 bytes[THREADS];
  __shared__ float absmax[UNIT / 32], code2[256], code[16];
  const int thread = threadIdx.x;
  const int64_t unit = begin + blockIdx.x * int64_t{UNIT};
  const int elements = static_cast<int>(min(int64_t{UNIT}, end - unit));

  const uint8_t* source = packed + unit / 2;
  const int n_bytes = (elements + 1) / 2;
  if (16 * thread + 16 <= n_bytes)
    bytes[thread] = load16_once(source + 16 * thread);
  else
    for (int i = 16 * thread; i < n_bytes; i++) reinterpret_cast<uint8_t*>(bytes)[i] = source[i];
  if (!scales.absmax) code2[thread] = scales.code2[thread];
  if (thread < 16) code[thread] = codebook.value[thread];
  __syncthreads();
  const int64_t first_block = unit >> shift;
  if (first_block + thread <= (unit + elements - 1) >> shift) absmax[thread] = scales.at(first_block + thread, code2);
  __syncthreads();

  constexpr int N = VECTOR<T>;
  const int into_block = static_cast<int>(unit - (first_block << shift));
  for (int i = N * thread; i < elements; i += N * THREADS) {
    const float scale = absmax[(into_block + i) >> shift];
    const uint32_t word = reinterpret_cast<const uint32_t*>(bytes)[i / 8] >> 4 * (i % 8);
    float values[N];
#pragma unroll
    for (int j = 0; j < N; j++) values[j] = __fmul_rn(code[nibble(word, j)], scale);
    store_floats(out + (unit - begin) + i, values, elements - i);
  }
}

}  // namespace

void dequantize(const Context& context, const Weight& weight, int64_t begin, int64_t end, DType dtype, void* out) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(context, "dequantize", dequantize_kernel<T>, static_cast<unsigned>(ceil_div(end - begin, int64_t{UNIT})), THREADS, 0,
           weight.packed, Scales(weight), Codebook(*weight.format), weight.shift(), begin, end, static_cast<T*>(out));
  });
}

}  // namespace lora_kernels::cuda
