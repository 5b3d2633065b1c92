// gptvq._C.Linear: a packed weight prepared once, so that a call passes little more than addresses.
#include <algorithm>

#include "bind.h"
#include "cpu/linear.h"

namespace py = pybind11;

namespace gptvq {
namespace {

std::unique_ptr<Linear> prepare(const Arg& idx, const Arg& cb, const Arg& gs, const std::optional<Arg>& sc, const std::optional<Arg>& table,
                                const std::optional<Arg>& bias_arg, const SpecArg& fields, const std::string& instruction_set) {
  const Spec spec = checked_spec(fields);
  const float* bias = nullptr;
  if (bias_arg) {
    const TensorArg b = tensor(*bias_arg);
    b.require("bias", "float32", {spec.rows});
    bias = b.data<const float>();
  }
  return std::make_unique<Linear>(checked_weight(idx, cb, gs, sc, table, spec), spec, bias, instruction_set);
}

OutType type_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("type: got " + std::to_string(code) + ", need 0, 1 or 2");
  return static_cast<OutType>(code);
}

// Addresses of contiguous x [tokens, cols] and y [tokens, rows], which the caller has checked: one call per layer and token.
void run(const std::vector<const Linear*>& layers, std::uintptr_t x, int type, std::int64_t tokens, const std::vector<std::uintptr_t>& y,
         int activations, int threads) {
  if (layers.size() != y.size())
    throw std::invalid_argument("y: got " + std::to_string(y.size()) + " outputs, need " + std::to_string(layers.size()) +
                                ", one per layer");
  if (tokens < 0) throw std::invalid_argument("tokens: got " + std::to_string(tokens) + ", need 0 or more");
  if (activations < 0 || activations > 2)
    throw std::invalid_argument("activations: got " + std::to_string(activations) + ", need 0, 1 or 2");
  std::vector<void*> outputs;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (!layers[i]) throw std::invalid_argument("layer " + std::to_string(i) + ": got None, need a Linear");
    const std::int64_t cols = layers[i]->spec().cols, need = layers[0]->spec().cols;
    if (cols != need)
      throw std::invalid_argument("layer " + std::to_string(i) + " has " + std::to_string(cols) + " columns, need " + std::to_string(need) +
                                  " as in layer 0");
    outputs.push_back(reinterpret_cast<void*>(y[i]));
  }
  const OutType out_type = type_of(type);
  if (tokens > 0 && !x) throw std::invalid_argument("x: got a tensor without storage, need one with data");
  if (tokens > 0 && std::find(y.begin(), y.end(), 0) != y.end())
    throw std::invalid_argument("y: got a tensor without storage, need one with data");
  without_gil([&] {
    linear(layers, reinterpret_cast<const void*>(x), out_type, tokens, outputs, static_cast<Activations>(activations), threads);
  });
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<Linear>(m, "Linear", "A packed weight on which `linear` can be called; its tensors must outlive it.")
      .def(py::init(&prepare), py::arg("idx"), py::arg("cb"), py::arg("gs"), py::arg("sc").none(true), py::arg("scale_table").none(true),
           py::arg("bias").none(true), py::arg("spec"), py::arg("instruction_set"))
      .def_property_readonly("fast", &Linear::fast, "whether the integer kernels take this shape")
      .def("run", [](const Linear& self, std::uintptr_t x, int type, std::int64_t tokens, std::uintptr_t y, int activations, int threads) {
        run({&self}, x, type, tokens, {y}, activations, threads);
      });
  m.def("linear", &run, py::arg("layers"), py::arg("x"), py::arg("type"), py::arg("tokens"), py::arg("y"), py::arg("activations"),
        py::arg("threads"), "y[i] = x W_i^T + b_i; type 0 float32, 1 float16, 2 bfloat16; activations 0 a16, 1 a8, 2 float32");
  m.def("instruction_sets", &instruction_sets, "those this module was built with and this processor has, best first");
}

}  // namespace gptvq
