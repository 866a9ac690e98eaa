// Static split of [0, n) over torch's threads.
#pragma once
#include <ATen/Parallel.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace lora_kernels::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(begin, end) on each thread.  Ranges of fewer than `grain` items are not worth a thread.  f must not throw.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), ceil_div(n, std::max<int64_t>(grain, 1)));
  if (threads <= 1) return f(int64_t{0}, n);
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t t = omp_get_thread_num(), T = omp_get_num_threads();
    const int64_t begin = n * t / T, end = n * (t + 1) / T;
    if (begin < end) f(begin, end);
  }
#else
  at::parallel_for(0, n, std::max<int64_t>(grain, 1), f);
#endif
}

// Memory that a thread keeps between calls: only grows, 64-byte aligned.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }

  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_) {
      ::operator delete(data_, std::align_val_t{64});
      data_ = nullptr;
      size_ = 0;
      data_ = ::operator new(bytes, std::align_val_t{64});
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lora_kernels::cpu
