// The formats that have been defined.
#include "formats.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

namespace lora_kernels {
namespace {

// A list that only grows, at its head: `format_of` runs for every layer of every call, and reads it without a lock.
struct Entry {
  Format format;
  std::string name;
  const Entry* next;
};

std::atomic<const Entry*> newest{nullptr};
std::mutex defining;

const Format* find(const char* name) {
  for (const Entry* e = newest.load(std::memory_order_acquire); e; e = e->next)
    if (e->name == name) return &e->format;
  return nullptr;
}

std::string known() {
  std::string names;
  for (const Entry* e = newest.load(std::memory_order_acquire); e; e = e->next)
    names = names.empty() ? e->name : e->name + ", " + names;
  return names;
}

}  // namespace

const Format& format_of(const char* name) {
  if (const Format* found = find(name)) return *found;
  throw std::invalid_argument("quant_type must be one of " + known() + ", got '" + name + "'");
}

void define_format(const char* name, const float* code, const uint8_t* order, const int64_t* blocksizes, int n) {
  const auto refuse = [&](const std::string& why) { throw std::invalid_argument("format '" + std::string(name) + "' " + why); };
  uint32_t places = 0;
  for (int i = 0; i < 16; i++) {
    if (order[i] > 15) refuse("must have an order of the indices 0 to 15, got " + std::to_string(order[i]));
    places |= 1u << order[i];
  }
  if (places != 0xffff) refuse("must have every index once in its order");
  Format format{};
  std::copy_n(code, 16, format.code);
  std::copy_n(order, 16, format.order);
  for (int i = 0; i < 15; i++) {
    const float below = code[order[i]], above = code[order[i + 1]];
    if (!(below <= above)) refuse("must have its indices in the order of their values");
    format.midpoints[i] = (below + above) / 2;
  }
  for (int i = 0; i < n; i++) {
    const int64_t size = blocksizes[i];
    if (size < MIN_BLOCKSIZE || size > MAX_BLOCKSIZE || (size & (size - 1)))
      refuse("must have blocks of a power of two from 32 to 4096 elements, got " + std::to_string(size));
    format.blocksizes |= static_cast<uint32_t>(size);
  }

  const std::lock_guard lock(defining);
  if (const Format* old = find(name)) {
    const bool same = std::equal(code, code + 16, old->code) && std::equal(order, order + 16, old->order) &&
                      format.blocksizes == old->blocksizes;
    if (!same) refuse("is defined already, with other values");
    return;
  }
  // never deleted: weights point to it
  newest.store(new Entry{format, name, newest.load(std::memory_order_relaxed)}, std::memory_order_release);
}

}  // namespace lora_kernels
