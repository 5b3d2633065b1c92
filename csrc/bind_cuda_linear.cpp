// gptvq._C.cuda: y = W x.  A weight is prepared once, so that a call passes little more than addresses, which the caller has checked.
#include "bind.h"
#include "cuda/linear.h"

namespace py = pybind11;

namespace gptvq {
namespace {

std::unique_ptr<cuda::Linear> prepare(const Arg& idx, const Arg& cb, const Arg& gs, const std::optional<Arg>& sc,
                                      const std::optional<Arg>& table, const std::optional<Arg>& bias, const SpecArg& fields, int,
                                      std::uint64_t) {
  const Spec spec = checked_spec(fields);
  return std::make_unique<cuda::Linear>(checked_weight(idx, cb, gs, sc, table, spec), spec, checked_bias(bias, spec.rows));
}

cuda::Arithmetic arithmetic_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("arithmetic: got " + std::to_string(code) + ", need 0, 1, 2 or 3");
  return static_cast<cuda::Arithmetic>(code);
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
  const std::vector<void*> outputs = checked_outputs(y, layers.size(), x, tokens);
  const OutType out_type = float_type(type);
  const cuda::Arithmetic kind = arithmetic_of(arithmetic);
  const std::int64_t need = cuda::linear_scratch(layers, tokens, kind, device);
  if (scratch_bytes < need || (need && (!scratch_memory || scratch_memory % 16)))
    throw std::invalid_argument("scratch: got " + std::to_string(scratch_bytes) + " bytes, need " + std::to_string(need) +
                                " at a multiple of 16");
  cuda::linear(layers, reinterpret_cast<const void*>(x), out_type, tokens, outputs, kind,
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
