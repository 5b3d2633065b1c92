// Shapes that the quantization kernels of every device share.
#pragma once
#include "bind.h"
#include "cpu/quantize.h"

namespace gptvq {

// Whether codes have a sign for each weight.
inline bool is_signed(const TensorArg& index) { return index.dtype == "int16"; }

// From centroids [groups, strips, k, d], index [rows, n] and strip [n]; what the strips hold and the scale are the caller's to check.
inline Columns column_shapes(const TensorArg& centroids, const TensorArg& index, const TensorArg& strip, std::int64_t group_rows) {
  if (centroids.shape.size() != 4 || index.shape.size() != 2) throw std::invalid_argument("centroids, index: need 4 and 2 dimensions");
  const Dims& c = centroids.shape;
  Columns out{index.shape[0], index.shape[1], c[3], c[0], c[1], c[2], group_rows, centroids.data<const float>(),
              strip.data<const std::int64_t>(), nullptr};
  if ((out.d != 1 && out.d != 2 && out.d != 4) || out.k < 1 || out.k > 256)
    throw std::invalid_argument("centroids: got another shape, need [row groups, strips, 1 to 256, 1, 2 or 4]");
  centroids.require("centroids", "float32", {c[0], c[1], c[2], c[3]});
  out.is_signed = is_signed(index);
  if (out.is_signed && (out.d != 4 || out.k != 256))
    throw std::invalid_argument("centroids: got another shape, need 256 vectors of 4 weights where codes have signs");
  index.require("index", out.is_signed ? "int16" : "uint8", {out.rows, out.n});
  strip.require("strip", "int64", {out.n});
  if (group_rows < 1 || out.groups * group_rows < out.rows) throw std::invalid_argument("group_rows: the groups do not cover the rows");
  return out;
}

// From x [groups, points, d], metric [metrics, d, d], weight [groups, points] and seeds [starts, groups, k, d].
inline Points point_shapes(const TensorArg& x, const TensorArg& metric, const TensorArg& weight, const TensorArg& seeds) {
  if (x.shape.size() != 3 || metric.shape.size() != 3 || seeds.shape.size() != 4)
    throw std::invalid_argument("x, metric, seeds: need 3, 3 and 4 dimensions");
  const Points p{x.shape[0], x.shape[1], x.shape[2], seeds.shape[2], seeds.shape[0], metric.shape[0], x.data<const float>(),
                 metric.data<const float>(), weight.data<const float>()};
  if ((p.d != 1 && p.d != 2 && p.d != 4) || p.k < 1 || p.starts < 1 || p.points < 1)
    throw std::invalid_argument("x, seeds: need points of dimension 1, 2 or 4, a centroid and a start");
  if (p.metrics < 1 || p.points % p.metrics) throw std::invalid_argument("metric: got a number of them that does not divide the points");
  x.require("x", "float32", {p.groups, p.points, p.d});
  metric.require("metric", "float32", {p.metrics, p.d, p.d});
  weight.require("weight", "float32", {p.groups, p.points});
  seeds.require("seeds", "float32", {p.starts, p.groups, p.k, p.d});
  return p;
}

// rounds: (iterations, how many starts stay).
inline std::vector<Round> checked_rounds(const std::vector<std::pair<std::int64_t, std::int64_t>>& rounds) {
  std::vector<Round> out;
  for (const auto& [iterations, keep] : rounds) {
    if (iterations < 1 || keep < 1) throw std::invalid_argument("rounds: got 0, need an iteration and a start that stays");
    out.push_back({iterations, keep});
  }
  return out;
}

}  // namespace gptvq
