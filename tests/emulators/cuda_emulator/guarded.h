// Memory that ends at a page no one may touch: an access behind it is a fault.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>

class Guarded {
 public:
  // `bytes` filled with NaN, aligned to 16; up to 15 more lie before the guard.
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), used = (bytes + 15) / 16 * 16;
    total_ = (used + page - 1) / page * page + page;
    void* p = mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(p);
    mprotect(base_ + total_ - page, page, PROT_NONE);
    data_ = base_ + total_ - page - used;
    used_ = used;
    poison();
  }
  ~Guarded() { munmap(base_, total_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void poison() { std::memset(data_, 0xff, used_); }
  // Whether the bytes between the end and the guard are as they were.
  bool intact() const {
    for (size_t i = bytes_; i < used_; i++)
      if (static_cast<unsigned char>(data_[i]) != 0xff) return false;
    return true;
  }

 private:
  size_t bytes_, total_, used_;
  char *base_, *data_;
};
