// gptvq._C.Linear: a packed weight prepared once, so that a call passes little more than addresses.
#include "bind.h"
#include "cpu/linear.h"
#include "cpu/matvec.h"

namespace py = pybind11;

namespace gptvq {
namespace {

std::unique_ptr<Linear> prepare(const Arg& idx, const Arg& cb, const Arg& gs, const std::optional<Arg>& sc, const std::optional<Arg>& table,
                                const std::optional<Arg>& bias, const SpecArg& fields, const std::string& instruction_set) {
  const Spec spec = checked_spec(fields);
  return std::make_unique<Linear>(checked_weight(idx, cb, gs, sc, table, spec), spec, checked_bias(bias, spec.rows), instruction_set);
}

// Addresses of contiguous x [tokens, cols] and y [tokens, rows], which the caller has checked: one call per layer and token.
void run(const std::vector<const Linear*>& layers, std::uintptr_t x, int type, std::int64_t tokens, const std::vector<std::uintptr_t>& y,
         int activations, int threads) {
  check_layers(layers, tokens);
  if (activations < 0 || activations > 2)
    throw std::invalid_argument("activations: got " + std::to_string(activations) + ", need 0, 1 or 2");
  const OutType out_type = float_type(type);
  const std::vector<void*> outputs = checked_outputs(y, layers.size(), x, tokens);
  without_gil([&] {
    linear(layers, reinterpret_cast<const void*>(x), out_type, tokens, outputs, static_cast<Activations>(activations), threads);
  });
}

// Address of contiguous out [rows, cols], which the caller has checked.
void unpack(const Linear& layer, std::int64_t row, std::int64_t rows, std::uintptr_t out, int type, int threads) {
  const Spec& spec = layer.spec();
  const bool within = row >= 0 && rows >= 0 && row <= spec.rows && rows <= spec.rows - row;
  const std::int64_t end = within ? row + rows : 0;
  if (!within || row % Spec::tile_rows || (end % Spec::tile_rows && end != spec.rows))
    throw std::invalid_argument("rows: got " + std::to_string(rows) + " from " + std::to_string(row) + " on, need whole tiles of " +
                                std::to_string(Spec::tile_rows) + " of " + std::to_string(spec.rows));
  const OutType out_type = float_type(type);
  without_gil([&] {
    layer.unpack(row / Spec::tile_rows, Spec::ceil_div(end, Spec::tile_rows), reinterpret_cast<void*>(out), out_type, threads);
  });
}

void dense_matvec(const Arg& weight_arg, const Arg& x_arg, const std::optional<Arg>& bias_arg, const Arg& y_arg, int threads) {
  const TensorArg weight = tensor(weight_arg), x = tensor(x_arg), y = tensor(y_arg);
  if (weight.shape.size() != 2)
    throw std::invalid_argument("weight: got " + std::to_string(weight.shape.size()) + " dimensions, need 2");
  const std::int64_t rows = weight.shape[0], cols = weight.shape[1];
  weight.require("weight", "bfloat16", {rows, cols});
  x.require("x", "bfloat16", {cols});
  y.require("y", "bfloat16", {rows});
  const float* bias = checked_bias(bias_arg, rows);
  without_gil([&] {
    matvec(weight.data<const std::uint16_t>(), x.data<const std::uint16_t>(), bias, rows, cols, y.data<std::uint16_t>(), threads);
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
      })
      .def("unpack", &unpack, py::arg("row"), py::arg("rows"), py::arg("out"), py::arg("type"), py::arg("threads"),
           "out [rows, cols] = the weights from `row` on, a multiple of 16");
  m.def("linear", &run, py::arg("layers"), py::arg("x"), py::arg("type"), py::arg("tokens"), py::arg("y"), py::arg("activations"),
        py::arg("threads"), "y[i] = x W_i^T + b_i; type 0 float32, 1 float16, 2 bfloat16; activations 0 a16, 1 a8, 2 float32");
  m.def("matvec", &dense_matvec, py::arg("weight"), py::arg("x"), py::arg("bias").none(true), py::arg("y"), py::arg("threads"),
        "y = weight x + bias, of a dense bfloat16 weight");
  m.def("instruction_sets", &instruction_sets, "those this module was built with and this processor has, best first");
}

}  // namespace gptvq
