// What csrc/cpu takes of torch's threads.  Files in csrc/ see torch, those in its folders do not: they compile in a fraction of
// the time, and once for all versions of torch.
#include <ATen/Parallel.h>

#include "cpu/parallel.h"

namespace lora_kernels::cpu {

int64_t num_threads() { return at::get_num_threads(); }

bool in_parallel_region() { return at::in_parallel_region(); }

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& f) {
  at::parallel_for(0, n, grain, f);
}

}  // namespace lora_kernels::cpu
