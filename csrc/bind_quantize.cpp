// The kernels of quantization as gptvq._C has them; every argument is checked again here, whatever Python checked before.
#include <algorithm>

#include "bind_columns.h"
#include "cpu/matmul.h"

namespace py = pybind11;

namespace gptvq {
namespace {

// A signed code is the number of one of 256 centroids whatever it holds.
void require_index(const TensorArg& index, const Columns& c) {
  if (c.is_signed) return;
  const std::uint8_t* codes = index.data<const std::uint8_t>();
  std::uint8_t most = 0;
  for (std::int64_t i = 0; i < c.rows * c.n; ++i) most = std::max(most, codes[i]);
  if (most >= c.k) throw std::invalid_argument("index: got " + std::to_string(most) + ", need numbers below the " + std::to_string(c.k) +
                                               " centroids");
}

void require_strips(const TensorArg& strip, const Columns& c) {
  strip.require("strip", "int64", {c.n});
  if (c.group_rows < 1 || c.groups * c.group_rows < c.rows) throw std::invalid_argument("group_rows: the groups do not cover the rows");
  for (std::int64_t i = 0; i < c.n; ++i)
    if (c.strip[i] < 0 || c.strip[i] >= c.strips) throw std::invalid_argument("strip: got a number that is not a strip's");
}

Columns columns(const TensorArg& centroids, const TensorArg& index, const TensorArg& strip, const std::optional<Arg>& scale_arg,
                std::int64_t group_rows) {
  Columns out = column_shapes(centroids, index, strip, group_rows);
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
    column_block(c, W.data<const float>(), U.data<const float>(), roots.data<const float>(), index.data<void>(),
                 E.data<float>(), threads);
  });
}

void columns_descend(const Arg& R_arg, const Arg& H_arg, const Arg& centroids_arg, const Arg& strip_arg,
                     const std::optional<Arg>& scale_arg, std::int64_t group_rows, const Arg& index_arg, const Arg& change_arg,
                     int threads) {
  const TensorArg R = tensor(R_arg), H = tensor(H_arg), index = tensor(index_arg), change = tensor(change_arg);
  const Columns c = columns(tensor(centroids_arg), index, tensor(strip_arg), scale_arg, group_rows);
  R.require("R", "float32", {c.rows, c.n * c.d});
  H.require("H", "float32", {c.n * c.d, c.n * c.d});
  change.require("change", "float32", {c.rows, c.n * c.d});
  require_index(index, c);
  without_gil([&] {
    descent_block(c, R.data<const float>(), H.data<const float>(), index.data<void>(), change.data<float>(), threads);
  });
}

void columns_decode(const Arg& index_arg, const Arg& centroids_arg, const Arg& strip_arg, const std::optional<Arg>& scale_arg,
                    std::int64_t group_rows, const Arg& Q_arg, int threads) {
  const TensorArg index = tensor(index_arg), Q = tensor(Q_arg);
  const Columns c = columns(tensor(centroids_arg), index, tensor(strip_arg), scale_arg, group_rows);
  Q.require("Q", "float32", {c.rows, c.n * c.d});
  require_index(index, c);
  without_gil([&] { decode(c, index.data<const void>(), Q.data<float>(), threads); });
}

void columns_collect(const Arg& index_arg, const Arg& values_arg, const Arg& strip_arg, std::int64_t group_rows, const Arg& sums_arg,
                     int threads) {
  const TensorArg index = tensor(index_arg), values = tensor(values_arg), sums = tensor(sums_arg), strip = tensor(strip_arg);
  if (sums.shape.size() != 4 || index.shape.size() != 2) throw std::invalid_argument("sums, index: need 4 and 2 dimensions");
  const Dims& s = sums.shape;
  Columns c{index.shape[0], index.shape[1], 0, s[0], s[1], s[2], group_rows, nullptr, strip.data<const std::int64_t>(), nullptr};
  c.is_signed = is_signed(index);
  if (c.is_signed && (s[2] != 256 || (s[3] != 4 && s[3] != 16)))
    throw std::invalid_argument("sums: got another shape, need 256 centroids of 4 or 16 values for an index of int16");
  sums.require("sums", "float64", {s[0], s[1], s[2], s[3]});
  index.require("index", c.is_signed ? "int16" : "uint8", {c.rows, c.n});
  values.require("values", "float32", {c.rows, c.n, s[3]});
  require_strips(strip, c);
  require_index(index, c);
  without_gil([&] {
    collect(c, index.data<const void>(), values.data<const float>(), s[3], sums.data<double>(), threads);
  });
}

// rounds: (iterations, how many starts stay), the last of which keeps one.
void fit_codebooks(const Arg& x_arg, const Arg& metric_arg, const Arg& weight_arg, const Arg& seeds_arg,
                   const std::vector<std::pair<std::int64_t, std::int64_t>>& rounds_arg, const Arg& centroids_arg, int threads) {
  const TensorArg x = tensor(x_arg), metric = tensor(metric_arg), weight = tensor(weight_arg), seeds = tensor(seeds_arg),
                  centroids = tensor(centroids_arg);
  const Points p = point_shapes(x, metric, weight, seeds);
  centroids.require("centroids", "float32", {p.groups, p.k, p.d});
  const std::vector<Round> rounds = checked_rounds(rounds_arg);
  without_gil([&] { fit(p, seeds.data<const float>(), rounds, centroids.data<float>(), threads); });
}

// float32 or bfloat16, two dimensions, any strides.
Matrix matrix(const char* name, const TensorArg& t, std::int64_t rows, std::int64_t cols) {
  if ((t.dtype != "float32" && t.dtype != "bfloat16") || t.shape != Dims{rows, cols} || t.strides.size() != 2)
    throw std::invalid_argument(std::string(name) + ": got another tensor, need float32 or bfloat16 [" + std::to_string(rows) + ", " +
                                std::to_string(cols) + "]");
  return {t.data<const void>(), t.dtype == "bfloat16", t.strides[0], t.strides[1]};
}

void product(const Arg& A_arg, const Arg& B_arg, const Arg& C_arg, float sign, bool add, bool upper, int threads) {
  const TensorArg A = tensor(A_arg), B = tensor(B_arg), C = tensor(C_arg);
  if (A.shape.size() != 2 || B.shape.size() != 2) throw std::invalid_argument("A, B: need 2 dimensions");
  const Product p{A.shape[0], B.shape[1], A.shape[1], sign, add, upper};
  const Matrix left = matrix("A", A, p.m, p.k), right = matrix("B", B, p.k, p.n);
  const Matrix out = matrix("C", C, p.m, p.n);
  if (out.bfloat16 || (out.col != 1 && p.n > 1) || (out.row < p.n && p.m > 1))
    throw std::invalid_argument("C: need float32 with contiguous rows");
  without_gil([&] { matmul(p, left, right, C.data<float>(), out.row, threads); });
}

}  // namespace

void bind_quantize(py::module_& m) {
  m.def("column_block", &columns_pass, py::arg("W"), py::arg("U"), py::arg("roots"), py::arg("centroids"), py::arg("strip"),
        py::arg("scale").none(true), py::arg("group_rows"), py::arg("stale"), py::arg("index"), py::arg("E"), py::arg("threads"));
  m.def("descent_block", &columns_descend, py::arg("R"), py::arg("H"), py::arg("centroids"), py::arg("strip"),
        py::arg("scale").none(true), py::arg("group_rows"), py::arg("index"), py::arg("change"), py::arg("threads"));
  m.def("decode", &columns_decode, py::arg("index"), py::arg("centroids"), py::arg("strip"), py::arg("scale").none(true),
        py::arg("group_rows"), py::arg("Q"), py::arg("threads"));
  m.def("collect", &columns_collect, py::arg("index"), py::arg("values"), py::arg("strip"), py::arg("group_rows"), py::arg("sums"),
        py::arg("threads"));
  m.def("fit", &fit_codebooks, py::arg("x"), py::arg("metric"), py::arg("weight"), py::arg("seeds"), py::arg("rounds"),
        py::arg("centroids"), py::arg("threads"));
  m.def("matmul", &product, py::arg("A"), py::arg("B"), py::arg("C"), py::arg("sign"), py::arg("add"), py::arg("upper"),
        py::arg("threads"));
  m.def("product_instructions", &product_instructions, py::arg("bfloat16"),
        "the instruction set of matmul, of bfloat16 or float32; that of the other kernels of quantization is the latter");
}

}  // namespace gptvq
