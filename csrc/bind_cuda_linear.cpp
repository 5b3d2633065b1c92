// gptvq._C.cuda: y = W x.  A weight is prepared once, so that a call passes little more than addresses, which the caller has checked.
#include <algorithm>

#include "bind.h"
#include "cuda/linear.h"

namespace py = pybind11;

namespace gptvq {
namespace {

std::unique_ptr<cuda::Linear> prepare(const Arg& idx, const Arg& cb, const Arg& gs, const std::optional<Arg>& sc,
                                      const std::optional<Arg>& table, const std::optional<Arg>& bias_arg, const SpecArg& fields, int,
                                      std::uint64_t) {
  const Spec spec = checked_spec(fields);
  const float* bias = nullptr;
  if (bias_arg) {
    const TensorArg b = tensor(*bias_arg);
    b.require("bias", "float32", {spec.rows});
    bias = b.data<const float>();
  }
  return std::make_unique<cuda::Linear>(checked_weight(idx, cb, gs, sc, table, spec), spec, bias);
}

cuda::Arithmetic arithmetic_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("arithmetic: got " + std::to_string(code) + ", need 0, 1, 2 or 3");
  return static_cast<cuda::Arithmetic>(code);
}

void check_layers(const std::vector<const cuda::Linear*>& layers, std::int64_t tokens) {
  if (tokens < 0) throw std::invalid_argument("tokens: got " + std::to_string(tokens) + ", need 0 or more");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (!layers[i]) throw std::invalid_argument("layer " + std::to_string(i) + ": got None, need a Linear");
    const std::int64_t cols = layers[i]->spec().cols, need = layers[0]->spec().cols;
    if (cols != need)
      throw std::invalid_argument("layer " + std::to_string(i) + " has " + std::to_string(cols) + " columns, need " + std::to_string(need) +
                                  " as in layer 0");
  }
}

std::int64_t scratch(const std::vector<const cuda::Linear*>& layers, std::int64_t tokens, int arithmetic, int device) {
  check_layers(layers, tokens);
  return cuda::linear_scratch(layers, tokens, arithmetic_of(arithmetic), device);
}

// Addresses of contiguous x [tokens, cols], y [tokens, rows] and `linear_scratch` bytes.
void run(const std::vector<const cuda::Linear*>& layers, std::uintptr_t x, int type, std::int64_t tokens,
         const std::vector<std::uintptr_t>& y, int arithmetic, std::uintptr_t scratch_memory, std::int64_t scratch_bytes, int device,
         std::uint64_t stream) {
  check_layers(layers, tokens);
  if (layers.size() != y.size())
    throw std::invalid_argument("y: got " + std::to_string(y.size()) + " outputs, need " + std::to_string(layers.size()) +
                                ", one per layer");
  if (type < 0 || type > 2) throw std::invalid_argument("type: got " + std::to_string(type) + ", need 0, 1 or 2");
  const cuda::Arithmetic kind = arithmetic_of(arithmetic);
  const std::int64_t need = cuda::linear_scratch(layers, tokens, kind, device);
  if (scratch_bytes < need || (need && (!scratch_memory || scratch_memory % 16)))
    throw std::invalid_argument("scratch: got " + std::to_string(scratch_bytes) + " bytes, need " + std::to_string(need) +
                                " at a multiple of 16");
  if (tokens > 0 && !x) throw std::invalid_argument("x: got a tensor without storage, need one with data");
  if (tokens > 0 && std::find(y.begin(), y.end(), 0) != y.end())
    throw std::invalid_argument("y: got a tensor without storage, need one with data");
  std::vector<void*> outputs;
  for (const std::uintptr_t address : y) outputs.push_back(reinterpret_cast<void*>(address));
  cuda::linear(layers, reinterpret_cast<const void*>(x), static_cast<OutType>(type), tokens, outputs, kind,
               reinterpret_cast<void*>(scratch_memory), device, stream);
}

}  // namespace

void bind_cuda_linear(py::module_& m) {
  // module_local: the emulator's module has a class of this name too
  py::class_<cuda::Linear>(m, "Linear", py::module_local(), "A packed weight on which `linear` can be called; its tensors must outlive it.")
      .def(py::init(&prepare), py::arg("idx"), py::arg("cb"), py::arg("gs"), py::arg("sc").none(true), py::arg("scale_table").none(true),
           py::arg("bias").none(true), py::arg("spec"), py::arg("device"), py::arg("stream"))
      .def_property_readonly("fast", &cuda::Linear::fast, "whether the integer kernels take this shape");
  m.def("linear_scratch", &scratch, py::arg("layers"), py::arg("tokens"), py::arg("arithmetic"), py::arg("device"),
        "bytes of scratch memory that `linear` needs");
  m.def("linear", &run, py::arg("layers"), py::arg("x"), py::arg("type"), py::arg("tokens"), py::arg("y"), py::arg("arithmetic"),
        py::arg("scratch"), py::arg("scratch_bytes"), py::arg("device"), py::arg("stream"),
        "y[i] = x W_i^T + b_i; type 0 float32, 1 float16, 2 bfloat16; arithmetic 0 a16, 1 a8, 2 float32, 3 float16");
  m.attr("most_tokens") = cuda::kMostTokens;
}

}  // namespace gptvq
