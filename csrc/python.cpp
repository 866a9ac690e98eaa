// The Python module lora_kernels._C: unpacks layers, releases the GIL, names what there is.  Its functions trust their callers
// in sizes and devices: lora_kernels/ops.py has checked them.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "host.h"
#include "layer.h"
#include "ops.h"

namespace lora_kernels {
namespace {

namespace py = pybind11;

// ---- layers, unpacked by hand: pybind11's casters take longer than the product of a small layer with one row

constexpr size_t FETCHED = 16 << 10;  // bytes of each tensor's data

void fetch(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// A layer was last used a whole model ago.  What describes its tensors, and then where their data begin, is fetched side by
// side: in the order in which they are used, each would be a miss to wait for.
void fetch(PyObject* tuple) {
  const auto each = [&](const auto& f) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++)
      if (PyObject* item = PyTuple_GET_ITEM(tuple, i); THPVariable_CheckExact(item))
        f(*THPVariable_Unpack(item).unsafeGetTensorImpl());
  };
  each([](const at::TensorImpl& t) { fetch(&t, sizeof t); });
  each([](const at::TensorImpl& t) { fetch(t.unsafe_storage().unsafeGetStorageImpl(), sizeof(at::StorageImpl)); });
  each([](const at::TensorImpl& t) {
    if (t.has_storage() && t.is_cpu()) fetch(t.unsafe_storage().data(), std::min(t.unsafe_storage().nbytes(), FETCHED));
  });
}

bool read(PyObject* item, Tensor& t) {
  if (!THPVariable_Check(item)) return false;
  t = THPVariable_Unpack(item);
  return true;
}
bool read(PyObject* item, OptionalTensor& t) { return item == Py_None || read(item, t.emplace()); }
bool read(PyObject* item, int64_t& n) {
  return PyLong_Check(item) && !PyBool_Check(item) && ((n = PyLong_AsLongLong(item)) != -1 || !PyErr_Occurred());
}
bool read(PyObject* item, double& v) { return (v = PyFloat_AsDouble(item)) != -1 || !PyErr_Occurred(); }
bool read(PyObject* item, std::array<int64_t, 2>& shape) {
  return PyTuple_Check(item) && PyTuple_GET_SIZE(item) == 2 && read(PyTuple_GET_ITEM(item, 0), shape[0]) &&
         read(PyTuple_GET_ITEM(item, 1), shape[1]);
}
bool read(PyObject* item, const Format*& format) {
  Py_ssize_t length = 0;
  const char* name = PyUnicode_Check(item) ? PyUnicode_AsUTF8AndSize(item, &length) : nullptr;
  if (!name) return false;
  if (std::strlen(name) != static_cast<size_t>(length)) throw std::invalid_argument("quant_type must have no zero byte");
  format = &format_of(name);
  return true;
}

const char* wanted(const Tensor&) { return "a torch.Tensor"; }
const char* wanted(const OptionalTensor&) { return "a torch.Tensor or None"; }
const char* wanted(int64_t) { return "an integer"; }
const char* wanted(double) { return "a number"; }
const char* wanted(const std::array<int64_t, 2>&) { return "a tuple of two integers"; }
const char* wanted(const Format*) { return "a string"; }

std::vector<std::string> layer_fields() {
  std::vector<std::string> names;
  const Layer layer;
  each_field(layer, [&](const char* name, const auto&) { names.emplace_back(name); });
  return names;
}

// Throws py::type_error for what is no tuple of N_FIELDS items, std::invalid_argument for an item of a wrong type.
void read(PyObject* tuple, Layer& layer) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != N_FIELDS) {
    std::string all, given = Py_TYPE(tuple)->tp_name;
    for (const std::string& name : layer_fields()) all += (all.empty() ? "" : ", ") + name;
    if (PyTuple_Check(tuple)) given = std::to_string(PyTuple_GET_SIZE(tuple));
    throw py::type_error("a layer must be a tuple of " + std::to_string(N_FIELDS) + " items (" + all + "), got " + given);
  }
  fetch(tuple);
  Py_ssize_t i = 0;
  each_field(layer, [&](const char* name, auto& member) {
    PyObject* item = PyTuple_GET_ITEM(tuple, i++);
    if (read(item, member)) return;
    PyErr_Clear();
    throw std::invalid_argument(std::string(name) + " must be " + wanted(member) + ", got " + Py_TYPE(item)->tp_name);
  });
}

std::vector<Layer> read_layers(py::handle sequence) {
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "layers must be a sequence of tuples"));
  if (!items) throw py::error_already_set();
  std::vector<Layer> layers(PySequence_Fast_GET_SIZE(items.ptr()));
  for (size_t i = 0; i < layers.size(); i++) read(PySequence_Fast_GET_ITEM(items.ptr(), i), layers[i]);
  return layers;
}

// ---- the ops that take layers

Outputs linear(const Tensor& x, py::handle layers) {
  const std::vector<Layer> list = read_layers(layers);
  const py::gil_scoped_release no_gil;
  return qlora_linear(x, list);
}

Gradients linear_backward(const std::vector<Tensor>& dys, const OptionalTensor& x, const std::vector<OptionalTensor>& hs,
                          py::handle layers, bool need_dx, const std::vector<std::array<bool, 3>>& needs) {
  const std::vector<Layer> list = read_layers(layers);
  const py::gil_scoped_release no_gil;
  return qlora_linear_backward(dys, x, hs, list, need_dx, needs);
}

// An item of a wrong type is for the contract in Python to refuse, as everything that contract.h does not take.
std::optional<std::vector<Tensor>> linear_autograd(Tensor x, py::handle layers) {
  std::vector<Layer> list;
  try {
    list = read_layers(layers);
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
  const py::gil_scoped_release no_gil;
  return qlora_linear_autograd(std::move(x), std::move(list));
}

// ---- what there is

void define(const std::string& name, const std::array<float, 16>& code, const std::array<uint8_t, 16>& order,
            const std::vector<int64_t>& blocksizes) {
  if (name.find('\0') != std::string::npos) throw std::invalid_argument("a format's name must have no zero byte");
  define_format(name.c_str(), code.data(), order.data(), blocksizes.data(), static_cast<int>(blocksizes.size()));
}

std::vector<std::string> cpu_levels() {
  const cpu::Kernels* levels[cpu::MAX_LEVELS];
  const int n = cpu::supported_levels(levels);
  std::vector<std::string> names;
  for (int i = 0; i < n; i++) names.emplace_back(levels[i]->name);
  return names;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = LORA_KERNELS_TORCH;
#ifdef LORA_KERNELS_CUDA
  info["cuda_archs"] = LORA_KERNELS_CUDA;  // "75 80 90+ptx"
  info["nvcc"] = LORA_KERNELS_NVCC;
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  return info;
}

}  // namespace
}  // namespace lora_kernels

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace lora_kernels;
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("quantize", &quantize, no_gil);
  m.def("decode_absmax", &decode_absmax, no_gil);
  m.def("dequantize", &dequantize, no_gil);
  m.def("qlora_linear", &linear);
  m.def("qlora_linear_backward", &linear_backward);
  // hooks on saved tensors are Python code, whose exceptions must come through
  m.def("qlora_linear_autograd", torch::wrap_pybind_function(&linear_autograd));
  m.def("layer_fields", [] { return py::tuple(py::cast(layer_fields())); }, "names of the items of a layer, in their order");
  m.def("define_format", &define, "name, code [16], order [16], blocksizes: see lora_kernels.formats.Format");
  m.def("cpu_level", [] { return std::string(cpu::kernels().name); }, "the instruction-set level in use");
  m.def("cpu_levels", &cpu_levels, "levels this CPU supports, best first");
  m.def("build_info", &build_info);
#ifdef LORA_KERNELS_CUDA
  m.def("cuda_problem", &cuda::problem, "why the CUDA runtime finds no device, or an empty string");
#endif
}
