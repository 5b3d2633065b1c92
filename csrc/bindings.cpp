// gptvq._C: every argument is checked again here, whatever Python checked before.
#include <array>

#include "bind.h"
#include "cpu/dequantize.h"
#include "cpu/packing.h"
#include "cuda/runtime.h"

namespace py = pybind11;
using namespace gptvq;

namespace {

using SpecArg = std::array<std::int64_t, 7>;                       // the fields of Spec, in order

TensorArg given(const char* name, const std::optional<Arg>& a) {
  if (!a) throw std::invalid_argument(std::string(name) + ": got None, need a tensor because the spec has block scales");
  return tensor(*a);
}

Spec checked_spec(const SpecArg& f) {
  const Spec spec{f[0], f[1], f[2], f[3], f[4], f[5], f[6]};
  spec.check();
  return spec;
}

void require_codes(const TensorArg& codes, const TensorArg& idx, const Spec& s) {
  codes.require("codes", "uint8", {s.rows, s.vectors()});
  idx.require("idx", "uint8", {s.tiles(), s.blocks(), s.block_bytes()});
}

void pack(const Arg& codes_arg, const Arg& idx_arg, const SpecArg& fields) {
  const Spec s = checked_spec(fields);
  const TensorArg codes = tensor(codes_arg), idx = tensor(idx_arg);
  require_codes(codes, idx, s);
  py::gil_scoped_release nogil;
  pack_codes(codes.data<const std::uint8_t>(), idx.data<std::uint8_t>(), s);
}

void unpack(const Arg& idx_arg, const Arg& codes_arg, const SpecArg& fields) {
  const Spec s = checked_spec(fields);
  const TensorArg codes = tensor(codes_arg), idx = tensor(idx_arg);
  require_codes(codes, idx, s);
  py::gil_scoped_release nogil;
  unpack_codes(idx.data<const std::uint8_t>(), codes.data<std::uint8_t>(), s);
}

OutType out_type(const std::string& dtype) {
  if (dtype == "float32") return OutType::float32;
  if (dtype == "float16") return OutType::float16;
  if (dtype == "bfloat16") return OutType::bfloat16;
  throw std::invalid_argument("out: got " + dtype + ", need float32, float16 or bfloat16");
}

void decode_packed(const Arg& idx_arg, const Arg& cb_arg, const Arg& gs_arg, const std::optional<Arg>& sc_arg,
            const std::optional<Arg>& table_arg, const Arg& out_arg, const SpecArg& fields, int threads) {
  const Spec s = checked_spec(fields);
  const TensorArg idx = tensor(idx_arg), cb = tensor(cb_arg), gs = tensor(gs_arg), out = tensor(out_arg);
  const OutType type = out_type(out.dtype);
  idx.require("idx", "uint8", {s.tiles(), s.blocks(), s.block_bytes()});
  cb.require("cb", "int8", {s.row_groups(), s.strips(), s.dim, s.codewords()});
  gs.require("gs", "bfloat16", {s.row_groups(), s.strips()});
  out.require("out", out.dtype.c_str(), {s.rows, s.cols});
  Packed weight{idx.data<const std::uint8_t>(), cb.data<const std::int8_t>(), gs.data<const std::uint16_t>(), nullptr, nullptr};
  if (s.scale_block) {
    const TensorArg sc = given("sc", sc_arg), table = given("scale table", table_arg);
    sc.require("sc", "uint8", {s.tiles(), Spec::ceil_div(s.scale_blocks(), 2), Spec::tile_rows});
    table.require("scale table", "float32", {s.scale_blocks(), 16});
    weight.sc = sc.data<const std::uint8_t>();
    weight.scale_table = table.data<const float>();
  } else if (sc_arg || table_arg) {
    throw std::invalid_argument("sc, scale table: got tensors, need None because the spec has no block scales");
  }
  py::gil_scoped_release nogil;
  dequantize(weight, out.data<void>(), type, s, threads);
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of gptvq.  A tensor is (address, dtype, shape, strides); call them through gptvq.ops.";
  m.def("pack_codes", &pack, py::arg("codes"), py::arg("idx"), py::arg("spec"));
  m.def("unpack_codes", &unpack, py::arg("idx"), py::arg("codes"), py::arg("spec"));
  m.def("dequantize", &decode_packed, py::arg("idx"), py::arg("cb"), py::arg("gs"), py::arg("sc").none(true),
        py::arg("scale_table").none(true), py::arg("out"), py::arg("spec"), py::arg("threads"));
  bind_quantize(m);
  m.def("cuda_info", &cuda, "{available, device_count, runtime, driver, why}: what CUDA offers to this build here");
#ifdef GPTVQ_WITH_CUDA
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
}
