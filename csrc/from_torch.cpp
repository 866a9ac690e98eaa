// What csrc/cpu takes of torch.  Files in csrc/ see torch, those in its folders do not: they compile in a fraction of the time,
// and once for all versions of torch.
#include "cpu/from_torch.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

namespace lora_kernels::cpu::torch {

int64_t num_threads() { return at::get_num_threads(); }

bool in_parallel_region() { return at::in_parallel_region(); }

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& f) {
  at::parallel_for(0, n, grain, f);
}

void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, bool add, const uint16_t* a, const uint32_t* b, float* c) {
  at::native::cpublas::brgemm(M, N, K, ld_a, N, N, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

void brgemm_release() { at::native::cpublas::brgemm_release(); }

bool brgemm_uses_amx() { return at::native::cpublas::could_pack(at::kBFloat16); }

bool onednn_enabled() { return at::globalContext().userEnabledMkldnn(); }

}  // namespace lora_kernels::cpu::torch
