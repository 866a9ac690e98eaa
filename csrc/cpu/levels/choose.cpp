// Chooses the instruction-set level, once.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#include "../kernels.h"
#ifdef LORA_KERNELS_X86
#include <cpuid.h>
#endif

namespace lora_kernels::cpu {

#ifdef LORA_KERNELS_X86
// clang's __builtin_cpu_supports does not know it.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

int supported_levels(const Kernels* out[MAX_LEVELS]) {
  int n = 0;
#ifdef LORA_KERNELS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // Cooper Lake has BF16 without VBMI.
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) {
    out[n++] = &avx512bf16_kernels;
    if (const Kernels* amx = amx_kernels()) {
      out[n++] = amx;
      if (has_amx()) std::swap(out[n - 2], out[n - 1]);  // without it our own tiles are faster: docs/cpu.md
    }
  }
  if (avx512) out[n++] = &avx512_kernels;
  if (avx2) out[n++] = &avx2_kernels;
#endif
  out[n++] = &portable_kernels;
  return n;
}

static const Kernels& choose() {
  const Kernels* levels[MAX_LEVELS];
  const int n = supported_levels(levels);
  const char* forced = std::getenv("LORA_KERNELS_CPU_ISA");
  if (!forced || !*forced) return *levels[0];
  std::string accepted;
  for (int i = 0; i < n; i++) {
    if (std::string(forced) == levels[i]->name) return *levels[i];
    accepted += (i ? ", " : "") + std::string(levels[i]->name);
  }
  throw std::invalid_argument("LORA_KERNELS_CPU_ISA must be one of " + accepted + " on this CPU, got '" + forced + "'");
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace lora_kernels::cpu
