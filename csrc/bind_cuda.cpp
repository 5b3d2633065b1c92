// gptvq._C.cuda: a tensor is (address, dtype, shape, strides) and lies on `device`; kernels are queued on `stream`, nothing waits.
//
// What the host can see is checked here.  What only the device sees, the numbers in a tensor, no kernel trusts with an address.
#include "bind.h"
#include "cuda/centroids.h"
#include "cuda/packing.h"

namespace py = pybind11;

namespace gptvq {
namespace {

void pack(const Arg& codes_arg, const Arg& idx_arg, const SpecArg& fields, int device, std::uint64_t stream) {
  const Spec s = checked_spec(fields);
  const TensorArg codes = tensor(codes_arg), idx = tensor(idx_arg);
  codes.require("codes", s.code_dtype(), {s.rows, s.vectors()});
  idx.require("idx", "uint8", {s.tiles(), s.blocks(), s.block_bytes()});
  require_alignment("idx", idx, 4);
  cuda::pack_codes(codes.data<const void>(), idx.data<std::uint8_t>(), s, device, stream);
}

void unpack(const Arg& idx_arg, const Arg& codes_arg, const SpecArg& fields, int device, std::uint64_t stream) {
  const Spec s = checked_spec(fields);
  const TensorArg codes = tensor(codes_arg), idx = tensor(idx_arg);
  codes.require("codes", s.code_dtype(), {s.rows, s.vectors()});
  idx.require("idx", "uint8", {s.tiles(), s.blocks(), s.block_bytes()});
  require_alignment("idx", idx, 4);
  cuda::unpack_codes(idx.data<const std::uint8_t>(), codes.data<void>(), s, device, stream);
}

void decode_packed(const Arg& idx_arg, const Arg& cb_arg, const Arg& gs_arg, const std::optional<Arg>& sc_arg,
                   const std::optional<Arg>& table_arg, const Arg& out_arg, const SpecArg& fields, int device, std::uint64_t stream) {
  const Spec s = checked_spec(fields);
  const TensorArg out = tensor(out_arg);
  const OutType type = float_type("out", out.dtype);
  const Packed weight = checked_weight(idx_arg, cb_arg, gs_arg, sc_arg, table_arg, s);
  require_alignment("idx", tensor(idx_arg), 4);
  out.require("out", out.dtype.c_str(), {s.rows, s.cols});
  cuda::dequantize(weight, out.data<void>(), type, s, device, stream);
}

// index [rows, n] and the groups that cover its rows.
cuda::Codes checked_codes(const TensorArg& index, std::int64_t groups, std::int64_t strips, std::int64_t k, std::int64_t group_rows) {
  if (index.shape.size() != 2) throw std::invalid_argument("index: need 2 dimensions");
  const cuda::Codes c{index.shape[0], index.shape[1], groups, strips, k, group_rows, index.data<const void>(), index.dtype == "int16"};
  index.require("index", c.is_signed ? "int16" : "uint8", {c.rows, c.n});
  if (c.is_signed && k != 256) throw std::invalid_argument("centroids: got another number of them, need 256 where codes have signs");
  if (c.k < 1 || c.k > 256 || c.strips < 1) throw std::invalid_argument("centroids: got another shape, need 1 to 256 of them, and a strip");
  if (group_rows < 1 || groups * group_rows < c.rows) throw std::invalid_argument("group_rows: the groups do not cover the rows");
  if (c.rows > 2147483647 || c.n > 2147483647 || groups * strips > 2147483647 || group_rows > 2147483647)
    throw std::invalid_argument("index: too large a layer for one launch");
  return c;
}

void columns_decode(const Arg& index_arg, const Arg& centroids_arg, const Arg& strip_arg, const std::optional<Arg>& scale_arg,
                    std::int64_t group_rows, const Arg& Q_arg, int device, std::uint64_t stream) {
  const TensorArg index = tensor(index_arg), centroids = tensor(centroids_arg), strip = tensor(strip_arg), Q = tensor(Q_arg);
  if (centroids.shape.size() != 4) throw std::invalid_argument("centroids: need 4 dimensions");
  const Dims& shape = centroids.shape;
  const std::int64_t d = shape[3];
  if (d != 1 && d != 2 && d != 4) throw std::invalid_argument("centroids: got vectors of another length, need 1, 2 or 4");
  const cuda::Codes c = checked_codes(index, shape[0], shape[1], shape[2], group_rows);
  if (c.is_signed && d != 4) throw std::invalid_argument("centroids: got vectors of another length, need 4 where codes have signs");
  centroids.require("centroids", "float32", {shape[0], shape[1], shape[2], d});
  strip.require("strip", "int64", {c.n});
  Q.require("Q", "float32", {c.rows, c.n * d});
  require_alignment("centroids", centroids, 4 * d);
  require_alignment("Q", Q, 4 * d);
  const float* scale = nullptr;
  if (scale_arg) {
    const TensorArg t = tensor(*scale_arg);
    t.require("scale", "float32", {c.rows, c.n});
    scale = t.data<const float>();
  }
  cuda::decode(c, d, centroids.data<const float>(), strip.data<const std::int64_t>(), scale, Q.data<float>(), device, stream);
}

void columns_collect(const Arg& index_arg, const Arg& values_arg, const Arg& order_arg, const Arg& bounds_arg, std::int64_t group_rows,
                     const Arg& sums_arg, int device, std::uint64_t stream) {
  const TensorArg index = tensor(index_arg), values = tensor(values_arg), order = tensor(order_arg), bounds = tensor(bounds_arg),
                  sums = tensor(sums_arg);
  if (sums.shape.size() != 4) throw std::invalid_argument("sums: need 4 dimensions");
  const Dims& shape = sums.shape;
  const cuda::Codes c = checked_codes(index, shape[0], shape[1], shape[2], group_rows);
  if (c.is_signed && shape[3] != 4 && shape[3] != 16)
    throw std::invalid_argument("sums: got vectors of another length, need 4 or 16 where codes have signs");
  sums.require("sums", "float64", {shape[0], shape[1], shape[2], shape[3]});
  values.require("values", "float32", {c.rows, c.n, shape[3]});
  order.require("order", "int64", {c.n});
  bounds.require("bounds", "int64", {c.strips + 1});
  cuda::collect(c, shape[3], values.data<const float>(), order.data<const std::int64_t>(), bounds.data<const std::int64_t>(),
                sums.data<double>(), device, stream);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.doc() = "Kernels of gptvq on NVIDIA GPUs; call them through gptvq.ops.";
  m.def("pack_codes", &pack, py::arg("codes"), py::arg("idx"), py::arg("spec"), py::arg("device"), py::arg("stream"));
  m.def("unpack_codes", &unpack, py::arg("idx"), py::arg("codes"), py::arg("spec"), py::arg("device"), py::arg("stream"));
  m.def("dequantize", &decode_packed, py::arg("idx"), py::arg("cb"), py::arg("gs"), py::arg("sc").none(true),
        py::arg("scale_table").none(true), py::arg("out"), py::arg("spec"), py::arg("device"), py::arg("stream"));
  m.def("decode", &columns_decode, py::arg("index"), py::arg("centroids"), py::arg("strip"), py::arg("scale").none(true),
        py::arg("group_rows"), py::arg("Q"), py::arg("device"), py::arg("stream"));
  m.def("collect", &columns_collect, py::arg("index"), py::arg("values"), py::arg("order"), py::arg("bounds"), py::arg("group_rows"),
        py::arg("sums"), py::arg("device"), py::arg("stream"));
  bind_cuda_quantize(m);
  bind_cuda_linear(m);
}

}  // namespace gptvq
