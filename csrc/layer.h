// What the linear layer takes besides x: the C++ side of lora_kernels/layer.py.
#pragma once
#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>

#include "formats.h"

namespace lora_kernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Layer {
  Tensor packed, absmax;
  OptionalTensor absmax2, code2, offset;
  std::array<int64_t, 2> shape{};  // N, K
  const Format* quant_type = nullptr;
  int64_t blocksize = 0;
  OptionalTensor lora_A, lora_B;
  double scaling = 1;
  OptionalTensor bias;
  double dropout_p = 0;
  OptionalTensor seed;
};

template <class T>
struct Field {
  const char* name;
  T Layer::* member;
};

// The fields in the order of lora_kernels.layer.FIELDS.  Nothing else in C++ knows it: a tuple is unpacked, the names are told
// to Python and a layer is saved for backward by going through this list.
inline constexpr std::tuple FIELDS(Field{"packed", &Layer::packed}, Field{"absmax", &Layer::absmax},
                                   Field{"absmax2", &Layer::absmax2}, Field{"code2", &Layer::code2},
                                   Field{"offset", &Layer::offset}, Field{"shape", &Layer::shape},
                                   Field{"quant_type", &Layer::quant_type}, Field{"blocksize", &Layer::blocksize},
                                   Field{"lora_A", &Layer::lora_A}, Field{"lora_B", &Layer::lora_B},
                                   Field{"scaling", &Layer::scaling}, Field{"bias", &Layer::bias},
                                   Field{"dropout_p", &Layer::dropout_p}, Field{"seed", &Layer::seed});
inline constexpr int N_FIELDS = std::tuple_size_v<decltype(FIELDS)>;

// f(name, member of `layer`) for each field.
template <class AnyLayer, class F>
inline void each_field(AnyLayer& layer, const F& f) {
  std::apply([&](const auto&... field) { (f(field.name, layer.*field.member), ...); }, FIELDS);
}

}  // namespace lora_kernels
