// Runs a kernel on one CPU thread: each thread of a block is a fiber that runs until it waits for others.  Blocks run one
// after another, in random order, and so do the warps of a block, each as far as it gets without the others, so that code that
// counts on an order gives wrong results here too.  Reported as errors: threads that wait for ever, lanes that meet at
// different instructions, accesses outside of an allocation or of dynamic shared memory, and misaligned ones.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "guarded.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

int capability = 80, processors = 4;

namespace {

constexpr size_t STACK = 128 * 1024;
constexpr int MOST_THREADS = 1024;

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

struct Fiber {
  ucontext_t entry;
  jmp_buf context;
  bool started = false;
  enum { READY, WAITING, DONE } state = DONE;
  const char* waits_at = "";
  uint3 index;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;
};

struct Warp {
  unsigned mask = 0, arrived = 0;
  const char* name = "";
  size_t size = 0;
  alignas(16) char slots[32 * 64];
};

Fiber fibers[MOST_THREADS];
Warp warps[MOST_THREADS / 32];
char* stacks = nullptr;
int n_threads = 0, alive = 0, at_barrier = 0, barrier_value = 0, barrier_result = 0;
const char* barrier_name = "";
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
sigjmp_buf scheduler;
std::string error;
std::unique_ptr<Guarded> shared_memory;
std::mt19937 order(1);

int flat(const uint3& i) { return static_cast<int>((i.z * blockDim.y + i.y) * blockDim.x + i.x); }

__attribute__((noinline)) void wait_at(const char* name) {
  current->state = Fiber::WAITING;
  current->waits_at = name;
  if (!_setjmp(current->context)) siglongjmp(scheduler, 1);
}

void run_fiber() {
  for (;;) {
    (*body)();
    current->state = Fiber::DONE;
    alive--;
    if (!_setjmp(current->context)) siglongjmp(scheduler, 1);
  }
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (sigsetjmp(scheduler, 0)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack = {stacks + (&fiber - fibers) * STACK, 0, STACK};
  makecontext(&fiber.entry, run_fiber, 0);
  setcontext(&fiber.entry);
}

void release_barrier() {
  barrier_result = barrier_value;
  at_barrier = barrier_value = 0;
  for (int i = 0; i < n_threads; i++)
    if (fibers[i].state == Fiber::WAITING && !std::strcmp(fibers[i].waits_at, barrier_name)) fibers[i].state = Fiber::READY;
}

std::string where() {
  auto text = [](auto i) { return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")"; };
  return " in thread " + text(threadIdx) + " of block " + text(blockIdx);
}

void on_signal(int signal, siginfo_t* info, void*) {
  if (!current) {
    ::signal(signal, SIG_DFL);
    return;
  }
  error = signal == SIGILL ? "misaligned access or index out of bounds" : "access outside of an allocation";
  (void)info;
  error += where();
  siglongjmp(scheduler, 1);
}

// Catches the signals of a kernel's bad accesses while it lives.
class Signals {
 public:
  Signals() {
    static char stack[64 * 1024];
    stack_t alternate = {stack, 0, sizeof stack};
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &action, &old_[i]);
  }
  ~Signals() {
    for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int NUMBERS[3] = {SIGSEGV, SIGBUS, SIGILL};
  struct sigaction old_[3];
  stack_t old_stack_;
};

// Resumes each lane that can go on, and returns whether there was one.
bool run_warp(int warp) {
  bool any = false;
  for (int i = 32 * warp; i < std::min(32 * warp + 32, n_threads) && error.empty(); i++)
    if (fibers[i].state == Fiber::READY) {
      any = true;
      resume(fibers[i]);
    }
  return any;
}

void run_block() {
  alive = n_threads;
  at_barrier = barrier_value = 0;
  for (Warp& w : warps) w.arrived = 0;
  for (int i = 0; i < n_threads; i++) {
    const unsigned x = i % blockDim.x, yz = i / blockDim.x;
    fibers[i].index = {x, yz % blockDim.y, yz / blockDim.y};
    fibers[i].state = Fiber::READY;
    fibers[i].copies.clear();
    fibers[i].open_copies.clear();
  }
  std::vector<int> warp_order((n_threads + 31) / 32);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  while (alive && error.empty()) {
    std::shuffle(warp_order.begin(), warp_order.end(), order);
    bool progress = false;
    for (int warp : warp_order)
      while (run_warp(warp) && error.empty()) progress = true;
    if (alive && at_barrier == alive && error.empty()) {
      release_barrier();
      progress = true;
    }
    if (!progress && error.empty()) {
      error = "threads wait for ever:";
      for (int i = 0; i < n_threads; i++)
        if (fibers[i].state == Fiber::WAITING && (i == 0 || std::strcmp(fibers[i].waits_at, fibers[i - 1].waits_at)))
          error += " from thread " + std::to_string(i) + " at " + fibers[i].waits_at;
      error += ", " + std::to_string(n_threads - alive) + " have returned";
    }
  }
  current = nullptr;
  if (!error.empty())
    for (Fiber& f : fibers) f.started = false;  // their stacks are in the middle of something
}

}  // namespace

void fail(const char* message) {
  error = message + where();
  siglongjmp(scheduler, 1);
}

int block_barrier(const char* name, int value) {
  if (at_barrier && std::strcmp(barrier_name, name)) fail("threads of a block meet at different barriers");
  barrier_name = name;
  at_barrier++;
  barrier_value += value;
  wait_at(name);
  return barrier_result;
}

void warp_collective(const char* name, unsigned mask, void* slot, size_t size, const std::function<void(char*)>& compute) {
  const int thread = flat(threadIdx), lane = thread % 32;
  Warp& warp = warps[thread / 32];
  if (!(mask >> lane & 1)) fail("a lane is not in the mask of its own collective");
  const int lanes = std::min(32, n_threads - (thread - lane));
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (warp.arrived && (warp.mask != mask || warp.size != size || std::strcmp(warp.name, name)))
    fail("lanes of a warp meet at different instructions or under different masks");
  warp.mask = mask, warp.size = size, warp.name = name;
  warp.arrived |= 1u << lane;
  std::memcpy(warp.slots + lane * size, slot, size);
  static void* destination[MOST_THREADS];
  destination[thread] = slot;
  if (warp.arrived != mask) return wait_at(name);
  compute(warp.slots);
  warp.arrived = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) {
      Fiber& fiber = fibers[thread / 32 * 32 + i];
      std::memcpy(destination[thread / 32 * 32 + i], warp.slots + i * size, size);
      if (i != lane) fiber.state = Fiber::READY;
    }
}

unsigned char* dynamic_shared() { return static_cast<unsigned char*>(shared_memory->data()); }

// A copy takes place as late as it may: what reads it before its wait finds NaN.
void copy_later(void* shared, const void* global, bool valid) {
  if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) % 16)
    fail("cp.async: an address is not aligned to 16 bytes");
  std::memset(shared, 0xff, 16);
  current->open_copies.push_back({shared, global, valid});
}

void commit_copies() {
  current->copies.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void wait_for_copies(int pending) {
  for (; static_cast<int>(current->copies.size()) > pending; current->copies.pop_front())
    for (const Copy& c : current->copies.front())
      if (c.valid)
        std::memcpy(c.shared, c.global, 16);
      else
        std::memset(c.shared, 0, 16);
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  error.clear();
  if (threads == 0 || threads > MOST_THREADS || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || config.dynamicSmemBytes > 227 * 1024)
    return cudaErrorInvalidConfiguration;
  if (!stacks)
    stacks = static_cast<char*>(
        mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  gridDim = grid, blockDim = block, n_threads = static_cast<int>(threads), body = &kernel;
  shared_memory = std::make_unique<Guarded>((config.dynamicSmemBytes + 15) / 16 * 16);
  const Signals signals;
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (const uint64_t i : blocks) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    shared_memory->poison();
    run_block();
    if (!error.empty()) return cudaErrorEmulator;
  }
  return cudaSuccess;
}

}  // namespace emulator

const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorEmulator ? "cudaErrorEmulator" : "cudaErrorInvalidConfiguration";
}

const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorEmulator ? emulator::error.c_str() : "invalid configuration argument";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? emulator::capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? emulator::capability % 10
           : attribute == cudaDevAttrMultiProcessorCount    ? emulator::processors
                                                            : (emulator::capability < 80 ? 64 : 99) * 1024;
  return cudaSuccess;
}
