// The device.  This library holds a CUDA runtime of its own, linked statically: torch's may be of another version or absent.
#include "common.cuh"

namespace lora_kernels::cuda {

std::string problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

void set_device(int device) { check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")"); }

}  // namespace lora_kernels::cuda
