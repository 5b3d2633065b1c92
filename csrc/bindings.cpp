// gptvq._C: every argument is checked again here, whatever Python checked before.
#include "bind.h"
#include "cpu/packing.h"
#include "cpu/quantize.h"
#include "cuda/runtime.h"

namespace py = pybind11;
using namespace gptvq;

namespace {

using Dims = std::vector<std::int64_t>;
void require_codes(const TensorArg& codes, const TensorArg& idx, const Spec& s) {
  codes.require("codes", "uint8", {s.rows, s.vectors()});
  idx.require("idx", "uint8", {s.tiles(), s.blocks(), s.block_bytes()});
}

void pack(const Arg& codes_arg, const Arg& idx_arg, const SpecArg& fields) {
  const Spec s = checked_spec(fields);
  const TensorArg codes = tensor(codes_arg), idx = tensor(idx_arg);
  require_codes(codes, idx, s);
  without_gil([&] { pack_codes(codes.data<const std::uint8_t>(), idx.data<std::uint8_t>(), s); });
}

void unpack(const Arg& idx_arg, const Arg& codes_arg, const SpecArg& fields) {
  const Spec s = checked_spec(fields);
  const TensorArg codes = tensor(codes_arg), idx = tensor(idx_arg);
  require_codes(codes, idx, s);
  without_gil([&] { unpack_codes(idx.data<const std::uint8_t>(), codes.data<std::uint8_t>(), s); });
}

void decode_packed(const Arg& idx_arg, const Arg& cb_arg, const Arg& gs_arg, const std::optional<Arg>& sc_arg,
            const std::optional<Arg>& table_arg, const Arg& out_arg, const SpecArg& fields, int threads) {
  const Spec s = checked_spec(fields);
  const TensorArg out = tensor(out_arg);
  const OutType type = float_type("out", out.dtype);
  const Packed weight = checked_weight(idx_arg, cb_arg, gs_arg, sc_arg, table_arg, s);
  out.require("out", out.dtype.c_str(), {s.rows, s.cols});
  without_gil([&] { dequantize(weight, out.data<void>(), type, s, threads); });
}

void require_index(const TensorArg& index, const Columns& c) {
  const std::int64_t* codes = index.data<const std::int64_t>();
  for (std::int64_t i = 0; i < c.rows * c.n; ++i)
    if (codes[i] < 0 || codes[i] >= c.k) throw std::invalid_argument("index: got a number that is not a centroid's");
}

void require_strips(const TensorArg& strip, const Columns& c) {
  strip.require("strip", "int64", {c.n});
  if (c.group_rows < 1 || c.groups * c.group_rows < c.rows) throw std::invalid_argument("group_rows: the groups do not cover the rows");
  for (std::int64_t i = 0; i < c.n; ++i)
    if (c.strip[i] < 0 || c.strip[i] >= c.strips) throw std::invalid_argument("strip: got a number that is not a strip's");
}

// Shapes from centroids [groups, strips, k, d] and index [rows, n]; everything else is checked against them.
Columns columns(const TensorArg& centroids, const TensorArg& index, const TensorArg& strip, const std::optional<Arg>& scale_arg,
                std::int64_t group_rows) {
  if (centroids.shape.size() != 4 || index.shape.size() != 2) throw std::invalid_argument("centroids, index: need 4 and 2 dimensions");
  const Dims& c = centroids.shape;
  Columns out{index.shape[0], index.shape[1], c[3], c[0], c[1], c[2], group_rows, centroids.data<const float>(),
              strip.data<const std::int64_t>(), nullptr};
  if ((out.d != 1 && out.d != 2 && out.d != 4) || out.k < 1)
    throw std::invalid_argument("centroids: got another shape, need [row groups, strips, k, 1, 2 or 4]");
  centroids.require("centroids", "float32", {c[0], c[1], c[2], c[3]});
  index.require("index", "int64", {out.rows, out.n});
  require_strips(strip, out);
  if (scale_arg) {
    const TensorArg scale = tensor(*scale_arg);
    scale.require("scale", "float32", {out.rows, out.n});
    out.scale = scale.data<const float>();
  }
  return out;
}

void columns_pass(const Arg& W_arg, const Arg& U_arg, const Arg& roots_arg, const Arg& centroids_arg, const Arg& strip_arg,
                  const std::optional<Arg>& scale_arg, std::int64_t group_rows, bool stale, const Arg& index_arg, const Arg& E_arg,
                  int threads) {
  const TensorArg W = tensor(W_arg), U = tensor(U_arg), roots = tensor(roots_arg), index = tensor(index_arg), E = tensor(E_arg);
  Columns c = columns(tensor(centroids_arg), index, tensor(strip_arg), scale_arg, group_rows);
  c.stale = stale;
  W.require("W", "float32", {c.rows, c.n * c.d});
  U.require("U", "float32", {c.n * c.d, c.n * c.d});
  roots.require("roots", "float32", {c.n, c.d, c.d});
  E.require("E", "float32", {c.rows, c.n * c.d});
  without_gil([&] {
    column_block(c, W.data<const float>(), U.data<const float>(), roots.data<const float>(), index.data<std::int64_t>(),
                 E.data<float>(), threads);
  });
}

void columns_descend(const Arg& R_arg, const Arg& H_arg, const Arg& centroids_arg, const Arg& strip_arg,
                     const std::optional<Arg>& scale_arg, std::int64_t group_rows, const Arg& index_arg, const Arg& change_arg, int threads) {
  const TensorArg R = tensor(R_arg), H = tensor(H_arg), index = tensor(index_arg), change = tensor(change_arg);
  const Columns c = columns(tensor(centroids_arg), index, tensor(strip_arg), scale_arg, group_rows);
  R.require("R", "float32", {c.rows, c.n * c.d});
  H.require("H", "float32", {c.n * c.d, c.n * c.d});
  change.require("change", "float32", {c.rows, c.n * c.d});
  require_index(index, c);
  without_gil([&] {
    descent_block(c, R.data<const float>(), H.data<const float>(), index.data<std::int64_t>(), change.data<float>(), threads);
  });
}

void columns_decode(const Arg& index_arg, const Arg& centroids_arg, const Arg& strip_arg, const std::optional<Arg>& scale_arg,
                    std::int64_t group_rows, const Arg& Q_arg, int threads) {
  const TensorArg index = tensor(index_arg), Q = tensor(Q_arg);
  const Columns c = columns(tensor(centroids_arg), index, tensor(strip_arg), scale_arg, group_rows);
  Q.require("Q", "float32", {c.rows, c.n * c.d});
  require_index(index, c);
  without_gil([&] { decode(c, index.data<const std::int64_t>(), Q.data<float>(), threads); });
}

void columns_collect(const Arg& index_arg, const Arg& values_arg, const Arg& strip_arg, std::int64_t group_rows, const Arg& sums_arg,
                     int threads) {
  const TensorArg index = tensor(index_arg), values = tensor(values_arg), sums = tensor(sums_arg), strip = tensor(strip_arg);
  if (sums.shape.size() != 4 || index.shape.size() != 2) throw std::invalid_argument("sums, index: need 4 and 2 dimensions");
  const Dims& s = sums.shape;
  const Columns c{index.shape[0], index.shape[1], 0, s[0], s[1], s[2], group_rows, nullptr, strip.data<const std::int64_t>(), nullptr};
  sums.require("sums", "float64", {s[0], s[1], s[2], s[3]});
  index.require("index", "int64", {c.rows, c.n});
  values.require("values", "float32", {c.rows, c.n, s[3]});
  require_strips(strip, c);
  require_index(index, c);
  without_gil([&] { collect(c, index.data<const std::int64_t>(), values.data<const float>(), s[3], sums.data<double>(), threads); });
}

void fit(const Arg& x_arg, const Arg& metric_arg, const Arg& centroids_arg, const std::optional<Arg>& loss_arg,
         std::int64_t iterations, int threads) {
  const TensorArg x = tensor(x_arg), metric = tensor(metric_arg), centroids = tensor(centroids_arg);
  if (x.shape.size() != 3 || centroids.shape.size() != 3) throw std::invalid_argument("x, centroids: need 3 dimensions");
  const std::int64_t groups = x.shape[0], points = x.shape[1], d = x.shape[2], k = centroids.shape[1];
  if ((d != 1 && d != 2 && d != 4) || k < 1) throw std::invalid_argument("x, centroids: need dimension 1, 2 or 4 and a centroid");
  x.require("x", "float32", {groups, points, d});
  metric.require("metric", "float32", {groups, points, d, d});
  centroids.require("centroids", "float32", {groups, k, d});
  double* loss = nullptr;
  if (loss_arg) {
    const TensorArg out = tensor(*loss_arg);
    out.require("loss", "float64", {groups});
    loss = out.data<double>();
  }
  without_gil([&] {
    em(x.data<const float>(), metric.data<const float>(), centroids.data<float>(), loss, groups, points, k, d, iterations, threads);
  });
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
  m.def("column_block", &columns_pass, py::arg("W"), py::arg("U"), py::arg("roots"), py::arg("centroids"), py::arg("strip"),
        py::arg("scale").none(true), py::arg("group_rows"), py::arg("stale"), py::arg("index"), py::arg("E"), py::arg("threads"));
  m.def("descent_block", &columns_descend, py::arg("R"), py::arg("H"), py::arg("centroids"), py::arg("strip"),
        py::arg("scale").none(true), py::arg("group_rows"), py::arg("index"), py::arg("change"), py::arg("threads"));
  m.def("decode", &columns_decode, py::arg("index"), py::arg("centroids"), py::arg("strip"), py::arg("scale").none(true),
        py::arg("group_rows"), py::arg("Q"), py::arg("threads"));
  m.def("collect", &columns_collect, py::arg("index"), py::arg("values"), py::arg("strip"), py::arg("group_rows"), py::arg("sums"),
        py::arg("threads"));
  m.def("em", &fit, py::arg("x"), py::arg("metric"), py::arg("centroids"), py::arg("loss").none(true),
        py::arg("iterations"), py::arg("threads"));
  bind_linear(m);
  m.def("cuda_info", &cuda, "{available, device_count, runtime, driver, why}: what CUDA offers to this build here");
#ifdef GPTVQ_WITH_CUDA
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
}
