// Kernels whose result is known or that are wrong in one way each: what the emulator is there to find.
#include <string>

#include "../../../csrc/cuda/decode.cuh"

using namespace lora_kernels::cuda;

namespace {

// out [16, 8] = a [16, 16] b [8, 16]^T through cp.async, ldmatrix and mma.
template <bool transposed, bool wait>
__global__ void product(const f16* a, const f16* b, float* out) {
  __shared__ __align__(16) f16 rows_a[16 * 16], rows_b[16 * 16];
  const int lane = threadIdx.x;
  cp_async_16(rows_a + 8 * lane, a + 8 * lane);
  cp_async_16(rows_b + 8 * lane, b + 8 * lane, lane < 16);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  __syncwarp();
  uint32_t fa[4], fb[4];
  const int row = lane % 16, half = lane / 16 * 8;
  if (transposed) {  // a holds its transpose
    ldmatrix_x4_transposed(fa, rows_a + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
  } else {
    ldmatrix_x4(fa, rows_a + row * 16 + half);
  }
  ldmatrix_x4(fb, rows_b + row * 16 + half);
  float c[4] = {};
  mma_m16n8k16<f16>(c, fa, fb[0], fb[2]);
  for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

__global__ void waits_for_the_departed() {
  if (threadIdx.x < 16) return;
  __syncwarp();
}

__global__ void diverged() {
  if (threadIdx.x % 32)
    __shfl_sync(ALL_LANES, 1, 0);
  else
    __syncwarp();
}

__global__ void out_of_bounds(int* p, int i) { p[i] = 1; }

__global__ void beyond_shared(int n) { dynamic_shared()[n] = 1; }

__global__ void misaligned(float* p) { store16(p + 1, make_uint4(0, 0, 0, 0)); }

// Right only if block 0 runs first.
__global__ void counts_on_order(int* p) {
  if (blockIdx.x == 0) *p = 1;
  if (*p != 1) p[1] = 1;
}

// Right only if warp 0 runs before warp 1.
__global__ void counts_on_warps(int* bad) {
  __shared__ int value;
  if (threadIdx.x == 0) value = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 32 && value != static_cast<int>(blockIdx.x)) *bad = 1;
}

// out = the 8 elements of each word under its scale.
template <class T>
__global__ void decode_words(Codebook codebook, const uint32_t* words, const float* scales, T* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t values[4];
  Table<T>(codebook, scales[i]).decode(words[i], values);
  store16(out + 8 * i, make_uint4(values[0], values[1], values[2], values[3]));
}

std::string error;

}  // namespace

extern "C" void probe_decode(int f16_, const float* code, int n, const uint32_t* words, const float* scales, void* out) {
  const Context context = {nullptr, {}, nullptr};
  lora_kernels::Format format{};
  for (int i = 0; i < 16; i++) format.code[i] = code[i];
  const Codebook codebook(format);
  if (f16_)
    launch(context, "decode_words", decode_words<f16>, n / 256, 256, 0, codebook, words, scales, static_cast<f16*>(out));
  else
    launch(context, "decode_words", decode_words<bf16>, n / 256, 256, 0, codebook, words, scales, static_cast<bf16*>(out));
}

// 0 or 1, what the kernel `name` leaves in out[1], or -1 and a message.
extern "C" int probe(const char* name_, const void* a, const void* b, void* out) {
  const std::string name = name_;
  const Context context = {nullptr, {}, nullptr};
  auto* ints = static_cast<int*>(out);
  auto *fa = static_cast<const f16*>(a), *fb = static_cast<const f16*>(b);
  auto* floats = static_cast<float*>(out);
  try {
    if (name == "product") launch(context, name_, product<false, true>, 1, 32, 0, fa, fb, floats);
    if (name == "transposed") launch(context, name_, product<true, true>, 1, 32, 0, fa, fb, floats);
    if (name == "no_wait") launch(context, name_, product<false, false>, 1, 32, 0, fa, fb, floats);
    if (name == "waits_for_the_departed") launch(context, name_, waits_for_the_departed, 1, 64, 0);
    if (name == "diverged") launch(context, name_, diverged, 1, 32, 0);
    if (name == "out_of_bounds") launch(context, name_, out_of_bounds, 1, 1, 0, ints, 1 << 30);
    if (name == "beyond_shared") launch(context, name_, beyond_shared, 1, 1, 1024, 1024);
    if (name == "misaligned") launch(context, name_, misaligned, 1, 1, 0, floats);
    if (name == "counts_on_order") launch(context, name_, counts_on_order, 32, 1, 0, ints);
    if (name == "counts_on_warps") launch(context, name_, counts_on_warps, 32, 64, 0, ints + 1);
    if (name == "too_many_threads") launch(context, name_, diverged, 1, 2048, 0);
  } catch (const std::exception& e) {
    error = e.what();
    return -1;
  }
  return ints[1] == 1;
}

extern "C" const char* probe_error() { return error.c_str(); }
