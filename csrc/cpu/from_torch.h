// What csrc/cpu takes of torch, without its headers (csrc/from_torch.cpp has them).
#pragma once
#include <cstdint>
#include <functional>

namespace lora_kernels::cpu::torch {

int64_t num_threads();
bool in_parallel_region();
// f(begin, end) on torch's threads, for ranges of at least `grain` of the items [0, n).
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& f);

// oneDNN's matrix product, of bf16 in float32 sums: a [M, K] x b [K / 2][N] pairs -> c [M, N], or added to what is there; rows
// of a ld_a values apart.  Throws std::exception where torch was built without it.
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, bool add, const uint16_t* a, const uint32_t* b, float* c);
void brgemm_release();   // what a thread does after its last product
bool brgemm_uses_amx();  // the CPU has AMX, and oneDNN may use it
bool onednn_enabled();   // not switched off (torch.backends.mkldnn.enabled)

}  // namespace lora_kernels::cpu::torch
