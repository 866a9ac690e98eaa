// Stands in for CUDA's header of this name, so that g++ compiles csrc/cuda/*.cu and the CPU runs them: what those files use of
// the language and of the runtime, and nothing else.  emulator.cpp runs the threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- the running thread

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

// Ends the launch with an error.
[[noreturn]] void fail(const char* message);

// Waits for the block's other threads; returns the sum of their values.
int block_barrier(const char* name, int value);

// Waits for the lanes in `mask`, the caller's among them.  `slot` is the caller's value; when all have come, `compute` gets
// the values of all lanes, [32] of `size` bytes, and what it leaves there is copied back to each lane's slot.
void warp_collective(const char* name, unsigned mask, void* slot, size_t size, const std::function<void(char*)>& compute);

template <class Slot, class Compute>
Slot collective(const char* name, unsigned mask, Slot slot, Compute&& compute) {
  static_assert(sizeof(Slot) <= 64);
  warp_collective(name, mask, &slot, sizeof(Slot), [&](char* slots) { compute(reinterpret_cast<Slot*>(slots)); });
  return slot;
}

inline int lane() { return threadIdx.x % 32; }

unsigned char* dynamic_shared();
void copy_later(void* shared, const void* global, bool valid);  // cp.async
void commit_copies();
void wait_for_copies(int pending);

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier("__syncthreads", 0); }
inline int __syncthreads_or(int v) { return emulator::block_barrier("__syncthreads_or", v != 0) != 0; }
inline int __syncthreads_count(int v) { return emulator::block_barrier("__syncthreads_count", v != 0); }
inline void __syncwarp(unsigned mask = 0xffffffff) {
  emulator::collective("__syncwarp", mask, 0, [](int*) {});
}
inline void __threadfence() {}
inline void __trap() { emulator::fail("__trap"); }

namespace emulator {

template <class V, class Source>
V shuffle(const char* name, unsigned mask, V v, Source source) {
  const int own = lane();
  struct Slot {
    V v;
    int source;
  };
  return collective(name, mask, Slot{v, source(own)},
                    [mask](Slot* slots) {
                      V all[32];
                      for (int i = 0; i < 32; i++) all[i] = slots[i].v;
                      for (int i = 0; i < 32; i++)
                        if (mask >> i & 1) {
                          if (!(mask >> slots[i].source & 1)) fail("a shuffle reads a lane that takes no part in it");
                          slots[i].v = all[slots[i].source];
                        }
                    })
      .v;
}

inline unsigned ballot(unsigned mask, bool v) {
  return collective("vote", mask, unsigned(v), [mask](unsigned* votes) {
    unsigned all = 0;
    for (int i = 0; i < 32; i++) all |= (mask >> i & 1 & votes[i]) << i;
    for (int i = 0; i < 32; i++) votes[i] = all;
  });
}

}  // namespace emulator

template <class V>
V __shfl_sync(unsigned mask, V v, int source, int width = 32) {
  return emulator::shuffle("__shfl_sync", mask, v, [=](int i) { return i / width * width + source % width; });
}
template <class V>
V __shfl_xor_sync(unsigned mask, V v, int lanes, int width = 32) {
  return emulator::shuffle("__shfl_xor_sync", mask, v, [=](int i) { return (i ^ lanes) / width > i / width ? i : i ^ lanes; });
}
template <class V>
V __shfl_down_sync(unsigned mask, V v, int lanes, int width = 32) {
  return emulator::shuffle("__shfl_down_sync", mask, v, [=](int i) { return i % width + lanes < width ? i + lanes : i; });
}
template <class V>
V __shfl_up_sync(unsigned mask, V v, int lanes, int width = 32) {
  return emulator::shuffle("__shfl_up_sync", mask, v, [=](int i) { return i % width >= lanes ? i - lanes : i; });
}
inline unsigned __ballot_sync(unsigned mask, int v) { return emulator::ballot(mask, v != 0); }
inline int __any_sync(unsigned mask, int v) { return emulator::ballot(mask, v != 0) != 0; }
inline int __all_sync(unsigned mask, int v) { return emulator::ballot(mask, v != 0) == mask; }

// Threads take turns, so plain arithmetic is atomic.  There is no atomicAdd of floats: its order would be the scheduler's.
inline int atomicAdd(int* p, int v) { return std::exchange(*p, *p + v); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return std::exchange(*p, *p + v); }
inline int atomicOr(int* p, int v) { return std::exchange(*p, *p | v); }
inline int atomicExch(int* p, int v) { return std::exchange(*p, v); }
inline unsigned atomicInc(unsigned* p, unsigned limit) { return std::exchange(*p, *p >= limit ? 0 : *p + 1); }

// ---- intrinsics

template <class V>
V __ldg(const V* p) {
  return *p;
}
template <class V>
V __ldcs(const V* p) {
  return *p;
}
template <class V>
V __ldcg(const V* p) {
  return *p;
}
template <class V>
void __stcg(V* p, V v) {
  *p = v;
}
template <class V>
void __stcs(V* p, V v) {
  *p = v;
}
inline void __nanosleep(unsigned) {}

inline float __uint_as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float __int_as_float(int i) { return __uint_as_float(static_cast<uint32_t>(i)); }
inline int __float_as_int(float f) { return static_cast<int>(__float_as_uint(f)); }
// Compiled with -ffp-contract=off, so that these round each operation.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t s = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (s & 7) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}
inline size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }

using std::max;
using std::min;

// ---- the runtime

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorEmulator };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t);
const char* cudaGetErrorName(cudaError_t);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int byte, size_t n, cudaStream_t) { return std::memset(p, byte, n), cudaSuccess; }

namespace emulator {
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return emulator::run(*config, [=] { kernel(static_cast<Parameters>(arguments)...); });
}
