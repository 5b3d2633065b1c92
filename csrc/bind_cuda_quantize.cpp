// The kernels of quantization on the device, as gptvq._C.cuda has them.  Shapes are checked here; the data cannot be looked at, so
// that the kernels clamp what they index with.
#include "bind_columns.h"
#include "cuda/column_block.h"
#include "cuda/em.h"

namespace py = pybind11;

namespace gptvq {
namespace {

// The distance between the rows of a float32 matrix whose rows are contiguous.
std::int64_t row_stride(const char* name, const TensorArg& t, std::int64_t rows, std::int64_t cols) {
  if (t.dtype != "float32" || t.shape != Dims{rows, cols} || t.strides.size() != 2 || (cols > 1 && t.strides[1] != 1) ||
      (rows > 1 && t.strides[0] < cols))
    throw std::invalid_argument(std::string(name) + ": got another tensor, need float32 [" + std::to_string(rows) + ", " +
                                std::to_string(cols) + "] with contiguous rows");
  return t.strides[0];
}

struct Block {
  Columns columns;
  cuda::ColumnStrides strides;
};

Block block(const TensorArg& from, const TensorArg& factor, const TensorArg& centroids, const TensorArg& strip,
            const std::optional<Arg>& scale_arg, std::int64_t group_rows, const TensorArg& index, const TensorArg& result,
            const char* const (&names)[3]) {
  Block b{column_shapes(centroids, index, strip, group_rows), {}};
  Columns& c = b.columns;
  b.strides.from = row_stride(names[0], from, c.rows, c.n * c.d);
  b.strides.factor = row_stride(names[1], factor, c.n * c.d, c.n * c.d);
  result.require(names[2], "float32", {c.rows, c.n * c.d});
  require_alignment(names[2], result, 4 * c.d);
  require_alignment("centroids", centroids, 4 * c.d);
  if (scale_arg) {
    const TensorArg scale = tensor(*scale_arg);
    b.strides.scale = row_stride("scale", scale, c.rows, c.n);
    c.scale = scale.data<const float>();
  }
  return b;
}

void columns_pass(const Arg& W_arg, const Arg& U_arg, const Arg& roots_arg, const Arg& centroids_arg, const Arg& strip_arg,
                  const std::optional<Arg>& scale_arg, std::int64_t group_rows, const std::optional<Arg>& start_arg, const Arg& index_arg,
                  const Arg& E_arg, int device, std::uint64_t stream) {
  const TensorArg W = tensor(W_arg), U = tensor(U_arg), roots = tensor(roots_arg), index = tensor(index_arg), E = tensor(E_arg);
  Block b = block(W, U, tensor(centroids_arg), tensor(strip_arg), scale_arg, group_rows, index, E, {"W", "U", "E"});
  roots.require("roots", "float32", {b.columns.n, b.columns.d, b.columns.d});
  const float* start = nullptr;
  if (start_arg) {
    const TensorArg t = tensor(*start_arg);
    b.strides.start = row_stride("start", t, b.columns.rows, b.columns.n * b.columns.d);
    start = t.data<const float>();
  }
  without_gil([&] {
    cuda::column_block(b.columns, b.strides, W.data<const float>(), U.data<const float>(), roots.data<const float>(), start,
                       index.data<void>(), E.data<float>(), device, stream);
  });
}

void columns_descend(const Arg& R_arg, const Arg& H_arg, const Arg& centroids_arg, const Arg& strip_arg,
                     const std::optional<Arg>& scale_arg, std::int64_t group_rows, const Arg& index_arg, const Arg& change_arg,
                     int device, std::uint64_t stream) {
  const TensorArg R = tensor(R_arg), H = tensor(H_arg), index = tensor(index_arg), change = tensor(change_arg);
  const Block b = block(R, H, tensor(centroids_arg), tensor(strip_arg), scale_arg, group_rows, index, change, {"R", "H", "change"});
  without_gil([&] {
    cuda::descent_block(b.columns, b.strides, R.data<const float>(), H.data<const float>(), index.data<void>(),
                        change.data<float>(), device, stream);
  });
}

py::dict describe_columns(std::int64_t rows, std::int64_t n, std::int64_t d, std::int64_t groups, std::int64_t strips, std::int64_t k,
                          std::int64_t group_rows, bool is_signed) {
  const cuda::ColumnPlan plan = cuda::column_plan({rows, n, d, groups, strips, k, group_rows, nullptr, nullptr, nullptr, false, is_signed});
  py::dict out;
  out["text"] = plan.text();
  out["tile"] = plan.tile;
  out["tile_groups"] = plan.tile_groups;
  return out;
}

py::dict describe_fit(std::int64_t groups, std::int64_t points, std::int64_t d, std::int64_t k, std::int64_t starts, std::int64_t metrics,
                      int device) {
  const cuda::EmPlan plan = cuda::em_plan({groups, points, d, k, starts, metrics, nullptr, nullptr, nullptr}, device);
  py::dict out;
  out["text"] = plan.text();
  out["scratch"] = plan.scratch;
  return out;
}

void fit_round(const Arg& x_arg, const Arg& metric_arg, const Arg& weight_arg, const Arg& tried_arg, std::int64_t iterations,
               const std::optional<Arg>& loss_arg, const std::optional<Arg>& scratch_arg, int device, std::uint64_t stream) {
  const TensorArg x = tensor(x_arg), tried = tensor(tried_arg);
  const Points p = point_shapes(x, tensor(metric_arg), tensor(weight_arg), tried);
  require_alignment("x", x, 4 * p.d);
  require_alignment("tried", tried, 4 * p.d);
  double* loss = nullptr;
  std::uint8_t* scratch = nullptr;
  if (loss_arg) {
    const TensorArg t = tensor(*loss_arg);
    t.require("loss", "float64", {p.starts, p.groups});
    loss = t.data<double>();
  }
  if (scratch_arg) {
    const TensorArg t = tensor(*scratch_arg);
    t.require("scratch", "uint8", {p.groups, p.starts, p.points});
    scratch = t.data<std::uint8_t>();
  }
  without_gil([&] { cuda::fit_round(p, tried.data<float>(), iterations, loss, scratch, device, stream); });
}

void fit_1d(const Arg& x_arg, const Arg& metric_arg, const Arg& weight_arg, const Arg& seeds_arg,
            const std::vector<std::pair<std::int64_t, std::int64_t>>& rounds_arg, const Arg& centroids_arg,
            const std::optional<Arg>& scratch_arg, int device, std::uint64_t stream) {
  const TensorArg seeds = tensor(seeds_arg), centroids = tensor(centroids_arg);
  const Points p = point_shapes(tensor(x_arg), tensor(metric_arg), tensor(weight_arg), seeds);
  centroids.require("centroids", "float32", {p.groups, p.k, p.d});
  const std::vector<Round> rounds = checked_rounds(rounds_arg);
  double* scratch = nullptr;
  if (scratch_arg) {
    const TensorArg t = tensor(*scratch_arg);
    t.require("scratch", "float64", {p.groups, 2, p.points + 1});
    scratch = t.data<double>();
  }
  without_gil([&] { cuda::fit_1d(p, seeds.data<const float>(), rounds, centroids.data<float>(), scratch, device, stream); });
}

}  // namespace

void bind_cuda_quantize(py::module_& m) {
  m.def("column_block", &columns_pass, py::arg("W"), py::arg("U"), py::arg("roots"), py::arg("centroids"), py::arg("strip"),
        py::arg("scale").none(true), py::arg("group_rows"), py::arg("start").none(true), py::arg("index"), py::arg("E"),
        py::arg("device"), py::arg("stream"));
  m.def("descent_block", &columns_descend, py::arg("R"), py::arg("H"), py::arg("centroids"), py::arg("strip"),
        py::arg("scale").none(true), py::arg("group_rows"), py::arg("index"), py::arg("change"), py::arg("device"), py::arg("stream"));
  m.def("column_plan", &describe_columns, py::arg("rows"), py::arg("n"), py::arg("d"), py::arg("groups"), py::arg("strips"), py::arg("k"),
        py::arg("group_rows"), py::arg("is_signed") = false);
  m.def("fit_round", &fit_round, py::arg("x"), py::arg("metric"), py::arg("weight"), py::arg("tried"), py::arg("iterations"),
        py::arg("loss").none(true), py::arg("scratch").none(true), py::arg("device"), py::arg("stream"));
  m.def("fit_1d", &fit_1d, py::arg("x"), py::arg("metric"), py::arg("weight"), py::arg("seeds"), py::arg("rounds"), py::arg("centroids"),
        py::arg("scratch").none(true), py::arg("device"), py::arg("stream"));
  m.def("fit_plan", &describe_fit, py::arg("groups"), py::arg("points"), py::arg("d"), py::arg("k"), py::arg("starts"), py::arg("metrics"),
        py::arg("device") = 0);
}

}  // namespace gptvq
