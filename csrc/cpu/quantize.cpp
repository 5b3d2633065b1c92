// Quantization kernels.  A lane is a row (column_block, descent_block) or a point (em): 16 lanes share one codebook, so a
// centroid is a broadcast and the argmin over centroids needs no horizontal step.  Compiled once per instruction set from
// GCC's portable vectors; arithmetic order does not depend on the number of threads.
#include "cpu/quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/parallel.h"
#include "cpu/per_isa.h"

#define GPTVQ_INLINE inline __attribute__((always_inline))

namespace gptvq {
namespace {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Int __attribute__((vector_size(4 * kLanes)));
using std::int64_t;

GPTVQ_INLINE Vec all(float v) { return Vec{} + v; }

// Up to 16 rows of one row group.
struct Tile {
  int64_t row, group;
  int lanes;
};

std::vector<Tile> tiles_of(const Columns& c) {
  std::vector<Tile> tiles;
  for (int64_t group = 0; group < c.groups; ++group) {
    const int64_t end = std::min(c.rows, (group + 1) * c.group_rows);
    for (int64_t row = group * c.group_rows; row < end; row += kLanes)
      tiles.push_back({row, group, static_cast<int>(std::min<int64_t>(kLanes, end - row))});
  }
  return tiles;
}

// The columns of a tile, a vector of lanes each.  Copied in and out: std::vector does not honour the alignment of Vec.
struct Lines {
  std::vector<float> data;

  explicit Lines(int64_t count) : data(static_cast<std::size_t>(count * kLanes)) {}
  GPTVQ_INLINE Vec get(int64_t i) const {
    Vec v;
    __builtin_memcpy(&v, data.data() + i * kLanes, sizeof v);
    return v;
  }
  GPTVQ_INLINE void set(int64_t i, Vec v) { __builtin_memcpy(data.data() + i * kLanes, &v, sizeof v); }

  // Row l of `rows`, `stride` apart, is lane l; missing lanes stay zero.
  GPTVQ_INLINE void load(const float* rows, int64_t stride, int lanes) {
    const int64_t count = static_cast<int64_t>(data.size()) / kLanes;
    for (int64_t i = 0; i < count; ++i)
      for (int l = 0; l < lanes; ++l) data[static_cast<std::size_t>(i * kLanes + l)] = rows[l * stride + i];
  }
  GPTVQ_INLINE void store(float* rows, int64_t stride, int lanes) const {
    const int64_t count = static_cast<int64_t>(data.size()) / kLanes;
    for (int l = 0; l < lanes; ++l)
      for (int64_t i = 0; i < count; ++i) rows[l * stride + i] = data[static_cast<std::size_t>(i * kLanes + l)];
  }
};

// argmin_k (y - c_k)^T M (y - c_k) for every lane; the first of equals wins.  c [k, D]; bias is scratch for k floats.
template <int D>
GPTVQ_INLINE Int nearest(const Vec* y, const float* M, const float* c, int64_t k, float* bias) {
  for (int64_t i = 0; i < k; ++i) {
    float sum = 0.f;
    for (int a = 0; a < D; ++a)
      for (int b = 0; b < D; ++b) sum += c[i * D + a] * M[a * D + b] * c[i * D + b];
    bias[i] = sum;
  }
  Vec pull[D];
  for (int a = 0; a < D; ++a) {
    pull[a] = Vec{};
    for (int b = 0; b < D; ++b) pull[a] += y[b] * all(-2.f * M[b * D + a]);
  }
  Vec best = all(std::numeric_limits<float>::max());
  Int at = {};
  for (int64_t i = 0; i < k; ++i) {
    Vec score = all(bias[i]);
    for (int a = 0; a < D; ++a) score += pull[a] * all(c[i * D + a]);
    const Int less = score < best;
    best = less ? score : best;
    at = less ? Int{} + static_cast<std::int32_t>(i) : at;
  }
  return at;
}

template <int D>
GPTVQ_INLINE void pick(const float* c, Int at, Vec* q) {
  for (int l = 0; l < kLanes; ++l)
    for (int a = 0; a < D; ++a) q[a][l] = c[at[l] * D + a];
}

GPTVQ_INLINE Vec scale_of(const Columns& c, const Tile& t, int64_t i) {
  Vec s = all(1.f);
  if (c.scale)
    for (int l = 0; l < t.lanes; ++l) s[l] = c.scale[(t.row + l) * c.n + i];
  return s;
}

template <int D>
GPTVQ_INLINE void column_tile(const Columns& c, const Tile& t, const float* W, const float* U, const float* roots,
                              int64_t* index, float* E) {
  const int64_t width = c.n * D;
  Lines w(width), e(width);
  std::vector<float> bias(static_cast<std::size_t>(c.k));
  w.load(W + t.row * width, width, t.lanes);
  const bool stale = c.stale && c.scale;
  const Lines start = stale ? w : Lines(0);
  for (int64_t i = 0; i < c.n; ++i) {
    const float* L = roots + i * D * D;
    const float* book = c.centroids + (t.group * c.strips + c.strip[i]) * c.k * D;
    float M[D * D];
    for (int a = 0; a < D; ++a)
      for (int b = 0; b < D; ++b) {
        M[a * D + b] = 0.f;
        for (int m = 0; m < D; ++m) M[a * D + b] += L[a * D + m] * L[b * D + m];
      }
    const Vec s = scale_of(c, t, i);
    Vec x[D], y[D], q[D], error[D];
    for (int a = 0; a < D; ++a) {
      x[a] = w.get(i * D + a);
      y[a] = (stale ? start.get(i * D + a) : x[a]) / s;
      error[a] = Vec{};
    }
    const Int at = nearest<D>(y, M, book, c.k, bias.data());
    for (int l = 0; l < t.lanes; ++l) index[(t.row + l) * c.n + i] = at[l];
    pick<D>(book, at, q);
    for (int a = 0; a < D; ++a)
      for (int b = 0; b < D; ++b) error[b] += (x[a] - q[a] * s) * all(L[a * D + b]);
    for (int b = 0; b < D; ++b) e.set(i * D + b, error[b]);
    for (int64_t j = (i + 1) * D; j < width; ++j) {
      Vec later = w.get(j);
      for (int b = 0; b < D; ++b) later -= error[b] * all(U[(i * D + b) * width + j]);
      w.set(j, later);
    }
  }
  e.store(E + t.row * width, width, t.lanes);
}

// Inverse of a symmetric positive definite [D, D] matrix by Gauss-Jordan in double.
template <int D>
GPTVQ_INLINE void invert(const float* from, int64_t stride, float* to) {
  double A[D][2 * D];
  for (int a = 0; a < D; ++a)
    for (int b = 0; b < D; ++b) A[a][b] = from[a * stride + b], A[a][D + b] = a == b;
  for (int p = 0; p < D; ++p) {
    const double pivot = 1 / A[p][p];
    for (int b = 0; b < 2 * D; ++b) A[p][b] *= pivot;
    for (int a = 0; a < D; ++a) {
      const double f = a == p ? 0 : A[a][p];
      for (int b = 0; b < 2 * D; ++b) A[a][b] -= f * A[p][b];
    }
  }
  for (int a = 0; a < D; ++a)
    for (int b = 0; b < D; ++b) to[a * D + b] = static_cast<float>(A[a][D + b]);
}

template <int D>
GPTVQ_INLINE void descent_tile(const Columns& c, const Tile& t, const float* R, const float* H, int64_t* index, float* change) {
  const int64_t width = c.n * D;
  Lines r(width), moved(width);
  std::vector<float> bias(static_cast<std::size_t>(c.k));
  r.load(R + t.row * width, width, t.lanes);
  for (int64_t i = 0; i < c.n; ++i) {
    const float* book = c.centroids + (t.group * c.strips + c.strip[i]) * c.k * D;
    float h[D * D], inverse[D * D];
    for (int a = 0; a < D; ++a)
      for (int b = 0; b < D; ++b) h[a * D + b] = H[(i * D + a) * width + i * D + b];
    invert<D>(h, D, inverse);
    const Vec s = scale_of(c, t, i);
    Int before = {};
    for (int l = 0; l < t.lanes; ++l) before[l] = static_cast<std::int32_t>(index[(t.row + l) * c.n + i]);
    Vec q[D], y[D], step[D];
    pick<D>(book, before, q);
    for (int a = 0; a < D; ++a) {
      step[a] = Vec{};
      for (int b = 0; b < D; ++b) step[a] += r.get(i * D + b) * all(inverse[a * D + b]);
      y[a] = q[a] + step[a] / s;
    }
    const Int at = nearest<D>(y, h, book, c.k, bias.data());
    for (int l = 0; l < t.lanes; ++l) index[(t.row + l) * c.n + i] = at[l];
    pick<D>(book, at, y);
    for (int a = 0; a < D; ++a) step[a] = (y[a] - q[a]) * s, moved.set(i * D + a, step[a]);
    for (int64_t j = (i + 1) * D; j < width; ++j) {
      Vec later = r.get(j);
      for (int b = 0; b < D; ++b) later -= step[b] * all(H[(i * D + b) * width + j]);
      r.set(j, later);
    }
  }
  moved.store(change + t.row * width, width, t.lanes);
}

// The weighted k-means of one group.
template <int D>
struct Group {
  static constexpr int F = D + D * (D + 1) / 2;
  const float* x;                   // [points, D]
  int64_t points, k;
  std::vector<float> features;      // [F, padded points]: (x-c)^T M (x-c) = spread + features . (c, products of c)
  std::vector<float> spread, value;
  std::vector<std::int32_t> index;

  GPTVQ_INLINE int64_t padded() const { return (points + kLanes - 1) / kLanes * kLanes; }

  GPTVQ_INLINE void prepare(const float* metric) {
    features.assign(static_cast<std::size_t>(F * padded()), 0.f);
    spread.assign(static_cast<std::size_t>(padded()), 0.f);
    value.resize(static_cast<std::size_t>(padded()));
    index.assign(static_cast<std::size_t>(padded()), -1);
    for (int64_t n = 0; n < points; ++n) {
      const float* M = metric + n * D * D;
      int f = D;
      for (int a = 0; a < D; ++a) {
        float pull = 0.f;
        for (int b = 0; b < D; ++b) pull += M[a * D + b] * x[n * D + b];
        features[static_cast<std::size_t>(a * padded() + n)] = -2 * pull;
        spread[static_cast<std::size_t>(n)] += pull * x[n * D + a];
        for (int b = a; b < D; ++b) features[static_cast<std::size_t>(f++ * padded() + n)] = M[a * D + b] * (a == b ? 1 : 2);
      }
    }
  }

  // Assigns every point; returns whether any index changed.
  GPTVQ_INLINE bool e_step(const float* c, float* psi) {
    for (int64_t i = 0; i < k; ++i) {
      int f = D;
      for (int a = 0; a < D; ++a) {
        psi[i * F + a] = c[i * D + a];
        for (int b = a; b < D; ++b) psi[i * F + f++] = c[i * D + a] * c[i * D + b];
      }
    }
    Int changed = {};
    for (int64_t n = 0; n < padded(); n += kLanes) {
      Vec phi[F];
      for (int f = 0; f < F; ++f) __builtin_memcpy(&phi[f], &features[static_cast<std::size_t>(f * padded() + n)], sizeof(Vec));
      Vec best = all(std::numeric_limits<float>::max());
      Int at = {}, before;
      for (int64_t i = 0; i < k; ++i) {
        Vec score = phi[0] * all(psi[i * F]);
        for (int f = 1; f < F; ++f) score += phi[f] * all(psi[i * F + f]);
        const Int less = score < best;
        best = less ? score : best;
        at = less ? Int{} + static_cast<std::int32_t>(i) : at;
      }
      __builtin_memcpy(&before, &index[static_cast<std::size_t>(n)], sizeof(Int));
      changed |= at != before;
      __builtin_memcpy(&index[static_cast<std::size_t>(n)], &at, sizeof(Int));
      __builtin_memcpy(&value[static_cast<std::size_t>(n)], &best, sizeof(Vec));
    }
    std::int32_t any = 0;
    for (int l = 0; l < kLanes; ++l) any |= changed[l];
    return any != 0;
  }

  // c_k = (sum M)^-1 sum M x in double; a centroid without weight moves to the point farthest from its own.
  GPTVQ_INLINE void m_step(float* c) {
    std::vector<double> sums(static_cast<std::size_t>(k * F), 0.0);
    for (int64_t n = 0; n < points; ++n) {
      double* to = &sums[static_cast<std::size_t>(index[static_cast<std::size_t>(n)] * F)];
      for (int f = 0; f < F; ++f) to[f] += features[static_cast<std::size_t>(f * padded() + n)];
    }
    std::vector<int64_t> empty;
    for (int64_t i = 0; i < k; ++i) {
      const double* s = &sums[static_cast<std::size_t>(i * F)];
      double A[D][D + 1], trace = 0;
      int f = D;
      for (int a = 0; a < D; ++a) {
        A[a][D] = -0.5 * s[a];
        for (int b = a; b < D; ++b, ++f) A[a][b] = A[b][a] = s[f] * (a == b ? 1 : 0.5);
        trace += A[a][a];
      }
      if (trace <= 0) {
        empty.push_back(i);
        continue;
      }
      for (int p = 0; p < D; ++p) {           // Gauss-Jordan; the matrix is positive definite
        for (int b = D; b >= p; --b) A[p][b] /= A[p][p];
        for (int a = 0; a < D; ++a)
          if (a != p)
            for (int b = D; b >= p; --b) A[a][b] -= A[a][p] * A[p][b];
      }
      for (int a = 0; a < D; ++a) c[i * D + a] = static_cast<float>(A[a][D]);
    }
    if (!empty.empty()) reseed(empty, c);
  }

  void reseed(const std::vector<int64_t>& empty, float* c) const {
    std::vector<int64_t> far(static_cast<std::size_t>(points));
    std::iota(far.begin(), far.end(), 0);
    const auto distance = [&](int64_t n) { return spread[static_cast<std::size_t>(n)] + value[static_cast<std::size_t>(n)]; };
    const std::size_t count = std::min(empty.size(), far.size());
    std::partial_sort(far.begin(), far.begin() + static_cast<std::ptrdiff_t>(count), far.end(), [&](int64_t a, int64_t b) {
      return distance(a) > distance(b) || (distance(a) == distance(b) && a < b);
    });
    for (std::size_t j = 0; j < count && distance(far[j]) > 0; ++j)
      std::copy_n(x + far[j] * D, D, c + empty[j] * D);
  }
};

template <int D>
GPTVQ_INLINE void em_group(const float* x, const float* metric, float* c, double* loss, int64_t points, int64_t k,
                           int64_t iterations) {
  Group<D> group{x, points, k, {}, {}, {}, {}};
  std::vector<float> psi(static_cast<std::size_t>(k * Group<D>::F));
  group.prepare(metric);
  for (int64_t i = 0; i < iterations && group.e_step(c, psi.data()); ++i) group.m_step(c);
  if (!loss) return;
  group.e_step(c, psi.data());
  *loss = 0;
  for (std::size_t n = 0; n < static_cast<std::size_t>(points); ++n) *loss += group.spread[n] + group.value[n];
}

#define GPTVQ_INSTANTIATE(D)                                                                                             \
  GPTVQ_PER_ISA void column_tile_##D(const Columns& c, const Tile& t, const float* W, const float* U, const float* roots, \
                                     int64_t* index, float* E) {                                                         \
    column_tile<D>(c, t, W, U, roots, index, E);                                                                         \
  }                                                                                                                      \
  GPTVQ_PER_ISA void descent_tile_##D(const Columns& c, const Tile& t, const float* R, const float* H, int64_t* index,   \
                                      float* change) {                                                                   \
    descent_tile<D>(c, t, R, H, index, change);                                                                          \
  }                                                                                                                      \
  GPTVQ_PER_ISA void em_group_##D(const float* x, const float* metric, float* c, double* loss, int64_t points,            \
                                  int64_t k, int64_t iterations) {                                                       \
    em_group<D>(x, metric, c, loss, points, k, iterations);                                                                  \
  }
GPTVQ_INSTANTIATE(1)
GPTVQ_INSTANTIATE(2)
GPTVQ_INSTANTIATE(4)

}  // namespace

void column_block(const Columns& c, const float* W, const float* U, const float* roots, int64_t* index, float* E, int threads) {
  const std::vector<Tile> tiles = tiles_of(c);
  const auto tile = c.d == 1 ? column_tile_1 : c.d == 2 ? column_tile_2 : column_tile_4;
  parallel_for(static_cast<int64_t>(tiles.size()), threads,
               [&](int64_t i) { tile(c, tiles[static_cast<std::size_t>(i)], W, U, roots, index, E); });
}

void descent_block(const Columns& c, const float* R, const float* H, int64_t* index, float* change, int threads) {
  const std::vector<Tile> tiles = tiles_of(c);
  const auto tile = c.d == 1 ? descent_tile_1 : c.d == 2 ? descent_tile_2 : descent_tile_4;
  parallel_for(static_cast<int64_t>(tiles.size()), threads,
               [&](int64_t i) { tile(c, tiles[static_cast<std::size_t>(i)], R, H, index, change); });
}

void em(const float* x, const float* metric, float* centroids, double* loss, int64_t groups, int64_t points, int64_t k, int64_t d,
        int64_t iterations, int threads) {
  const auto group = d == 1 ? em_group_1 : d == 2 ? em_group_2 : em_group_4;
  parallel_for(groups, threads, [&](int64_t g) {
    group(x + g * points * d, metric + g * points * d * d, centroids + g * k * d, loss ? loss + g : nullptr, points, k, iterations);
  });
}

void decode(const Columns& c, const int64_t* index, float* Q, int threads) {
  constexpr int64_t kRows = 16;
  parallel_for((c.rows + kRows - 1) / kRows, threads, [&](int64_t part) {
    for (int64_t row = part * kRows; row < std::min(c.rows, (part + 1) * kRows); ++row) {
      const float* books = c.centroids + row / c.group_rows * c.strips * c.k * c.d;
      for (int64_t i = 0; i < c.n; ++i) {
        const float* q = books + (c.strip[i] * c.k + index[row * c.n + i]) * c.d;
        const float s = c.scale ? c.scale[row * c.n + i] : 1.f;
        for (int64_t a = 0; a < c.d; ++a) Q[(row * c.n + i) * c.d + a] = q[a] * s;
      }
    }
  });
}

void collect(const Columns& c, const int64_t* index, const float* values, int64_t f, double* sums, int threads) {
  parallel_for(c.groups, threads, [&](int64_t group) {        // a group's sums are its own: one thread, rows in order
    double* books = sums + group * c.strips * c.k * f;
    std::fill_n(books, c.strips * c.k * f, 0.0);
    for (int64_t row = group * c.group_rows; row < std::min(c.rows, (group + 1) * c.group_rows); ++row)
      for (int64_t i = 0; i < c.n; ++i) {
        double* to = books + (c.strip[i] * c.k + index[row * c.n + i]) * f;
        for (int64_t a = 0; a < f; ++a) to[a] += values[(row * c.n + i) * f + a];
      }
  });
}

}  // namespace gptvq
