// What the dense ops share: a weight with its scales in float32, ready to be decoded piece by piece.
#pragma once
#include "../codebooks.h"
#include "../ops.h"
#include "kernels.h"
#include "parallel.h"

namespace lora_kernels::cpu {

class Decoder {
 public:
  // Scales of a double-quantized weight are decoded into `scratch` (numel / blocksize floats) here, once a call.
  Decoder(const Weight& weight, Scratch& scratch)
      : weight_(weight), codebook_(weight.quant_type == QuantType::nf4 ? NF4 : FP4), absmax_(weight.absmax) {
    while ((int64_t{1} << shift_) < weight.blocksize) shift_++;
    if (absmax_) return;
    float* decoded = scratch.get<float>(weight.n_blocks());
    decode_absmax(weight, decoded);
    absmax_ = decoded;
  }

  // Elements [begin, end) of the flattened weight, rounded to `dtype`, stored in it or, `as_f32`, in float32.
  void elements(DType dtype, bool as_f32, int64_t begin, int64_t end, void* out) const {
    const Kernels& k = kernels();
    const auto decode = dtype == DType::f32   ? k.decode_f32
                        : dtype == DType::f16 ? (as_f32 ? k.decode_f16_as_f32 : k.decode_f16)
                                              : (as_f32 ? k.decode_bf16_as_f32 : k.decode_bf16);
    decode(weight_.packed, codebook_, absmax_, shift_, begin, end, out);
  }

  const Weight& weight() const { return weight_; }

 private:
  const Weight& weight_;
  const float* codebook_;
  const float* absmax_;
  int shift_ = 0;
};

}  // namespace lora_kernels::cpu
