// The ops of csrc/cuda for Python: copies every argument to guarded memory, runs the op, copies the results back.
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/ops.h"
#include "guarded.h"

namespace emulator {
extern int capability, processors;
}

namespace {

using namespace lora_kernels;

struct WeightArguments {
  const void *packed, *absmax, *absmax_u8, *absmax2, *code2, *offset;
  int64_t N, K, blocksize;
  const char* quant_type;
};

struct AdapterArguments {
  const void *A, *B;
  int A_dtype, B_dtype;
  int64_t r;
  float scaling;
  double dropout_p;
  const void* seed;
};

std::string last_error;

// The memory of one call.
class Call {
 public:
  const void* in(const void* p, int64_t bytes) {
    if (!p) return nullptr;
    void* copy = allocate(bytes);
    std::memcpy(copy, p, static_cast<size_t>(bytes));
    return copy;
  }
  template <class T>
  const T* in(const void* p, int64_t n) {
    return static_cast<const T*>(in(p, n * static_cast<int64_t>(sizeof(T))));
  }
  void* out(void* p, int64_t bytes, bool keep = false) {
    if (!p) return nullptr;
    void* copy = allocate(bytes);
    if (keep) std::memcpy(copy, p, static_cast<size_t>(bytes));
    outputs_.push_back({p, copy, static_cast<size_t>(bytes)});
    return copy;
  }
  template <class T>
  T* out(void* p, int64_t n, bool keep = false) {
    return static_cast<T*>(out(p, n * static_cast<int64_t>(sizeof(T)), keep));
  }
  Dense dense(const void* p, int dtype, int64_t n) {
    return {in(p, n * itemsize(static_cast<DType>(dtype))), static_cast<DType>(dtype)};
  }
  Weight weight(const WeightArguments& a) {
    Weight w;
    w.N = a.N, w.K = a.K, w.blocksize = a.blocksize, w.format = a.quant_type ? &format_of(a.quant_type) : nullptr;
    w.packed = in<uint8_t>(a.packed, (w.numel() + 1) / 2);
    w.absmax = in<float>(a.absmax, w.n_blocks());
    w.absmax_u8 = in<uint8_t>(a.absmax_u8, w.n_blocks());
    w.absmax2 = in<float>(a.absmax2, (w.n_blocks() + 255) / 256);
    w.code2 = in<float>(a.code2, 256);
    w.offset = in<float>(a.offset, 1);
    return w;
  }
  Adapter adapter(const AdapterArguments& a, int64_t N, int64_t K) {
    Adapter adapter;
    adapter.A = dense(a.A, a.A_dtype, a.r * K), adapter.B = dense(a.B, a.B_dtype, a.r * N);
    adapter.r = a.r, adapter.scaling = a.scaling, adapter.dropout_p = a.dropout_p;
    adapter.seed = in<int64_t>(a.seed, 1);
    return adapter;
  }
  cuda::Context context() {
    return {nullptr, [this](int64_t bytes) { return allocate(bytes); }, counters_};
  }
  void finish() {
    for (int i = 0; i < cuda::COUNTERS; i++)
      if (counters_[i]) throw std::runtime_error("counter " + std::to_string(i) + " is not left at zero");
    for (const auto& m : memory_)
      if (!m->intact()) throw std::runtime_error("a store behind an allocation of " + std::to_string(m->bytes()) + " bytes");
    for (const Output& o : outputs_) std::memcpy(o.target, o.copy, o.bytes);
  }

 private:
  struct Output {
    void *target, *copy;
    size_t bytes;
  };

  void* allocate(int64_t bytes) {
    memory_.push_back(std::make_unique<Guarded>(static_cast<size_t>(bytes)));
    return memory_.back()->data();
  }

  std::vector<std::unique_ptr<Guarded>> memory_;
  std::vector<Output> outputs_;
  int32_t counters_[cuda::COUNTERS] = {};
};

template <class F>
bool run(F&& op) {
  try {
    auto call = std::make_unique<Call>();
    op(*call);
    call->finish();
    return true;
  } catch (const std::exception& e) {
    last_error = e.what();
    return false;
  }
}

}  // namespace

extern "C" {

const char* emulator_error() { return last_error.c_str(); }

void emulator_device(int capability, int processors) {
  emulator::capability = capability;
  emulator::processors = processors;
}

bool emulate_define_format(const char* name, const float* code, const uint8_t* order, const int64_t* blocksizes, int n) {
  return run([&](Call&) { define_format(name, code, order, blocksizes, n); });
}

bool emulate_quantize(const void* weight, int dtype, int64_t numel, const char* quant_type, int64_t blocksize, void* packed,
                      void* absmax, void* bad) {
  return run([&](Call& c) {
    cuda::quantize(c.context(), c.dense(weight, dtype, numel), numel, format_of(quant_type), blocksize,
                   c.out<uint8_t>(packed, (numel + 1) / 2), c.out<float>(absmax, (numel + blocksize - 1) / blocksize),
                   c.out<int32_t>(bad, 1, true));
  });
}

bool emulate_quantize_absmax(const void* absmax, int64_t n_blocks, const void* offset, const void* code2, void* absmax_u8,
                             void* absmax2) {
  return run([&](Call& c) {
    cuda::quantize_absmax(c.context(), c.in<float>(absmax, n_blocks), n_blocks, c.in<float>(offset, 1), c.in<float>(code2, 256),
                          c.out<uint8_t>(absmax_u8, n_blocks), c.out<float>(absmax2, (n_blocks + 255) / 256));
  });
}

bool emulate_decode_absmax(const WeightArguments* weight, void* out) {
  return run([&](Call& c) {
    const Weight w = c.weight(*weight);
    cuda::decode_absmax(c.context(), w, c.out<float>(out, w.n_blocks()));
  });
}

bool emulate_dequantize(const WeightArguments* weight, int64_t begin, int64_t end, int dtype, void* out) {
  return run([&](Call& c) {
    const DType t = static_cast<DType>(dtype);
    cuda::dequantize(c.context(), c.weight(*weight), begin, end, t, c.out(out, (end - begin) * itemsize(t)));
  });
}

bool emulate_qlora_linear(int dtype, int64_t M, const void* x, const WeightArguments* weight, const AdapterArguments* adapter,
                          const void* bias, int bias_dtype, void* y, void* h, int product) {
  return run([&](Call& c) {
    const DType t = static_cast<DType>(dtype);
    const int64_t size = itemsize(t), N = weight->N, K = weight->K, r = adapter->r;
    cuda::qlora_linear(c.context(), t, M, c.in(x, M * K * size), c.weight(*weight), c.adapter(*adapter, N, K),
                       c.dense(bias, bias_dtype, N), c.out(y, M * N * size), c.out(h, M * r * size), product);
  });
}

bool emulate_qlora_linear_backward(int dtype, int64_t M, const void* dy, const void* x, const void* h,
                                   const WeightArguments* weight, const AdapterArguments* adapter, int accumulate_dx, void* dx,
                                   void* dA, void* dB, void* dbias, int product) {
  return run([&](Call& c) {
    const DType t = static_cast<DType>(dtype);
    const int64_t size = itemsize(t), N = weight->N, K = weight->K, r = adapter->r;
    const Adapter a = c.adapter(*adapter, N, K);
    cuda::qlora_linear_backward(
        c.context(), t, M, c.in(dy, M * N * size), c.in(x, M * K * size), c.in(h, M * r * size), c.weight(*weight), a,
        accumulate_dx, c.out(dx, M * K * (accumulate_dx ? 4 : size), accumulate_dx), c.out(dA, r * K * itemsize(a.A.dtype)),
        c.out(dB, r * N * itemsize(a.B.dtype)), c.out<float>(dbias, N), product);
  });
}

}  // extern "C"
