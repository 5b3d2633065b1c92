// gptvq._C: every argument is checked again here, whatever Python checked before.
#include "bind.h"
#include "common/pool.h"
#include "cpu/linear.h"
#include "cpu/packing.h"
#include "cuda/runtime.h"

namespace py = pybind11;
using namespace gptvq;

namespace {

void require_codes(const TensorArg& codes, const TensorArg& idx, const Spec& s) {
  codes.require("codes", s.code_dtype(), {s.rows, s.vectors()});
  idx.require("idx", "uint8", {s.tiles(), s.blocks(), s.block_bytes()});
}

void pack(const Arg& codes_arg, const Arg& idx_arg, const SpecArg& fields) {
  const Spec s = checked_spec(fields);
  const TensorArg codes = tensor(codes_arg), idx = tensor(idx_arg);
  require_codes(codes, idx, s);
  without_gil([&] { pack_codes(codes.data<const void>(), idx.data<std::uint8_t>(), s); });
}

void unpack(const Arg& idx_arg, const Arg& codes_arg, const SpecArg& fields) {
  const Spec s = checked_spec(fields);
  const TensorArg codes = tensor(codes_arg), idx = tensor(idx_arg);
  require_codes(codes, idx, s);
  without_gil([&] { unpack_codes(idx.data<const std::uint8_t>(), codes.data<void>(), s); });
}

void decode_packed(const Arg& idx_arg, const Arg& cb_arg, const Arg& gs_arg, const std::optional<Arg>& sc_arg,
            const std::optional<Arg>& table_arg, const Arg& out_arg, const SpecArg& fields, int threads) {
  const Spec s = checked_spec(fields);
  const TensorArg out = tensor(out_arg);
  const OutType type = float_type("out", out.dtype);
  const Packed weight = checked_weight(idx_arg, cb_arg, gs_arg, sc_arg, table_arg, s);
  out.require("out", out.dtype.c_str(), {s.rows, s.cols});
  without_gil([&] { Linear(weight, s, nullptr, "").unpack(0, s.tiles(), out.data<void>(), type, threads); });
}

py::dict cuda() {
#ifdef GPTVQ_WITH_CUDA
  const CudaInfo info = cuda_info();
#else
  CudaInfo info;
  info.why = "gptvq was built without CUDA";
#endif
  py::dict d;
  d["available"] = info.device_count > 0;
  d["device_count"] = info.device_count;
  d["runtime"] = info.runtime;
  d["driver"] = info.driver;
  d["why"] = info.why;
  return d;
}

// As INTERFACE of gptvq/backends/module.py, which refuses a module of another one: raise both when a function, what it takes, or the
// layout of what it reads or writes changes.
constexpr int kInterface = 3;

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of gptvq.  A tensor is (address, dtype, shape, strides); call them through gptvq.ops.";
  m.attr("interface") = kInterface;
  m.def("use_threads_of", [](std::uintptr_t torch_parallel_for) { use_threads_of(reinterpret_cast<TorchParallelFor>(torch_parallel_for)); },
        py::arg("torch_parallel_for"), "The address of that function, whose threads are taken from now on; 0: threads of our own");
  m.def("pack_codes", &pack, py::arg("codes"), py::arg("idx"), py::arg("spec"));
  m.def("unpack_codes", &unpack, py::arg("idx"), py::arg("codes"), py::arg("spec"));
  m.def("dequantize", &decode_packed, py::arg("idx"), py::arg("cb"), py::arg("gs"), py::arg("sc").none(true),
        py::arg("scale_table").none(true), py::arg("out"), py::arg("spec"), py::arg("threads"));
  bind_linear(m);
  bind_call(m);
  bind_quantize(m);
  m.def("cuda_info", &cuda, "{available, device_count, runtime, driver, why}: what CUDA offers to this build here");
#ifdef GPTVQ_WITH_CUDA
  py::module_ kernels = m.def_submodule("cuda");
  bind_cuda(kernels);
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
}
