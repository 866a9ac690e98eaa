// Work shared by torch's threads, and the memory they work in.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "from_torch.h"

namespace lora_kernels::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(begin, end) on each thread.  Ranges of fewer than `grain` items are not worth a thread.  f must not throw.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t threads = std::min<int64_t>(torch::num_threads(), ceil_div(n, std::max<int64_t>(grain, 1)));
  if (threads <= 1) return f(int64_t{0}, n);
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t t = omp_get_thread_num(), T = omp_get_num_threads();
    const int64_t begin = n * t / T, end = n * (t + 1) / T;
    if (begin < end) f(begin, end);
  }
#else
  torch::parallel_for(n, std::max<int64_t>(grain, 1), f);
#endif
}

// The threads of one parallel region, which do all phases of an op: with a region for each phase, the threads would be woken
// for each.  Without OpenMP a team is one thread.
class Team {
 public:
  struct Shared {
    std::atomic<int64_t> next[3] = {};  // one a phase, in turn
  };
  Team(Shared& shared, int64_t thread, int64_t threads) : thread(thread), threads(threads), shared_(shared) {}

  // f(i) for i in [0, n), each thread its own number first, then one by one by whichever is free.
  template <class F>
  void share(int64_t n, const F& f) {
    if (threads == 1) {
      for (int64_t i = 0; i < n; i++) f(i);
      return;
    }
    auto& next = shared_.next[phase_];
    for (int64_t i = thread; i < n; i = threads + next.fetch_add(1, std::memory_order_relaxed)) f(i);
  }

  // All threads have finished this phase, and see what the others wrote.
  void sync() {
    if (threads == 1) return;
    // no thread is in the phase before this one, and none in the one after, whose counter can be reset now
    if (thread == 0) shared_.next[(phase_ + 1) % 3].store(0, std::memory_order_relaxed);
    phase_ = (phase_ + 1) % 3;
#ifdef _OPENMP
#pragma omp barrier
#endif
  }

  const int64_t thread, threads;

 private:
  Shared& shared_;
  int phase_ = 0;
};

// f(team) on at most `threads` threads.  f must not throw.
template <class F>
void with_team(int64_t threads, const F& f) {
  Team::Shared shared;
#ifdef _OPENMP
  threads = std::min<int64_t>(threads, torch::in_parallel_region() ? 1 : torch::num_threads());
  if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
      Team team(shared, omp_get_thread_num(), omp_get_num_threads());
      f(team);
    }
    return;
  }
#endif
  Team team(shared, 0, 1);
  f(team);
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
