// What every CUDA source uses: element types, conversions, accesses of 16 bytes, launches that check their errors.
// No torch header here or in any file of this folder, and no <<<>>>: tests/emulators/cuda_emulator compiles the same files for
// the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "../ops.h"
#include "ptx.cuh"

namespace lora_kernels::cuda {

using f16 = __half;
using bf16 = __nv_bfloat16;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

template <class I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
template <class I>
__host__ __device__ constexpr I round_up(I a, I b) {
  return ceil_div(a, b) * b;
}

// ---- elements

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, f16>)
    return __float2half_rn(v);
  else if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(v);
  else
    return v;
}

// Two elements in a register, `first` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float first, float second) {
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same_v<T, f16>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t pair) {
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same_v<T, f16>)
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  else
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}

// ---- 16 bytes at once

template <class T>
inline constexpr int VECTOR = 16 / sizeof(T);  // elements in 16 bytes

__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
// Read once: does not displace what others read again.
__device__ __forceinline__ uint4 load16_once(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }

// p[0 .. VECTOR<T>) as float32; `n` of them exist, the others read as zero.
template <class T>
__device__ __forceinline__ void load_floats(const T* p, float (&out)[VECTOR<T>], int64_t n = VECTOR<T>) {
  if (n >= VECTOR<T> && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    const uint4 raw = load16(p);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if constexpr (sizeof(T) == 4) {
        out[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = unpack2<T>(words[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR<T>; i++) out[i] = i < n ? to_float(p[i]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_floats(T* p, const float (&v)[VECTOR<T>], int64_t n = VECTOR<T>) {
  if (n >= VECTOR<T> && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      if constexpr (sizeof(T) == 4)
        words[i] = __float_as_uint(v[i]);
      else
        words[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
    store16(p, make_uint4(words[0], words[1], words[2], words[3]));
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR<T>; i++)
      if (i < n) p[i] = from_float<T>(v[i]);
  }
}

// An element of an optional tensor whose dtype is known at run time.
__device__ __forceinline__ float load_dense(Dense t, int64_t i) {
  return t.dtype == DType::f32   ? static_cast<const float*>(t.data)[i]
         : t.dtype == DType::f16 ? to_float(static_cast<const f16*>(t.data)[i])
                                 : to_float(static_cast<const bf16*>(t.data)[i]);
}

// ---- sums and maxima over a warp, the same in every lane

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = WARP / 2; lanes; lanes /= 2) v += __shfl_xor_sync(ALL_LANES, v, lanes);
  return v;
}

// ---- on the host

template <class T>
struct Type {
  using type = T;
};

// f(Type<float>{}), f(Type<f16>{}) or f(Type<bf16>{}).
template <class F>
decltype(auto) dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::f16:
      return f(Type<f16>{});
    default:
      return f(Type<bf16>{});
  }
}

// Throws std::runtime_error unless `error` is cudaSuccess.
inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not show up again in somebody else's check
  throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device, value;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// 75, 80, 90 and so on, of the current device.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Runs `kernel` on the context's stream; an empty grid runs nothing.  `op` names the launch in an error.
template <class... Parameters, class... Arguments>
void launch(const Context& context, const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // more must be asked for
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(context.stream);
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error == cudaSuccess) return;
  auto text = [](unsigned n) { return std::to_string(n); };
  check(error, std::string(op) + ": launching " + text(grid.x) + " x " + text(grid.y) + " x " + text(grid.z) + " blocks of " +
                   std::to_string(threads) + " threads with " + std::to_string(shared_bytes) +
                   " bytes of shared memory failed");
}

}  // namespace lora_kernels::cuda
