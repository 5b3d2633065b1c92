// Assignment of codes, column by column.  A lane is a row: the 16 rows of a tile share one codebook, so that a centroid is a
// broadcast and the argmin over centroids needs no horizontal step.  A tile is one thread's: nothing depends on their number.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/aligned.h"
#include "common/parallel.h"
#include "cpu/quantize.h"
#include "cpu/simd.h"

namespace gptvq {
namespace {

using std::int64_t;

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

// The columns of a tile, a vector of lanes each.
struct Lines {
  int64_t count;
  Aligned<float> data;

  explicit Lines(int64_t count) : count(count), data(count * kLanes) {}
  GPTVQ_INLINE Vec get(int64_t i) const {
    Vec v;
    __builtin_memcpy(&v, &data[i * kLanes], sizeof v);
    return v;
  }
  GPTVQ_INLINE void set(int64_t i, Vec v) { __builtin_memcpy(&data[i * kLanes], &v, sizeof v); }

  // Row l of `rows`, `count` apart, is lane l; missing lanes are zero.
  GPTVQ_INLINE void load(const float* rows, int lanes) {
    for (int64_t i = 0; i < count; ++i)
      for (int l = 0; l < kLanes; ++l) data[i * kLanes + l] = l < lanes ? rows[l * count + i] : 0.f;
  }
  GPTVQ_INLINE void store(float* rows, int lanes) const {
    for (int l = 0; l < lanes; ++l)
      for (int64_t i = 0; i < count; ++i) rows[l * count + i] = data[i * kLanes + l];
  }
};

// Codes as they lie in an index.
template <bool Signs>
struct Codes {
  using Type = std::conditional_t<Signs, std::int16_t, std::uint8_t>;
  static constexpr int half = Signs ? 8 : 1;          // changes of sign, of which each stands for its opposite too

  static int64_t number(Type code) { return Signs ? code & 255 : code; }
  static float with_sign(float value, Type code, int64_t dimension) { return Signs && code >> (8 + dimension) & 1 ? -value : value; }
};

// A walk over the vectors of a tile: each gets its code, and what that changes goes to all later columns.
template <int D, bool Signs>
struct Walk {
  using C = Codes<Signs>;
  using Code = typename C::Type;
  const Columns& c;
  const Tile& t;
  Code* index;
  Lines columns, result;
  std::vector<float> bias;            // [k, C::half]

  GPTVQ_INLINE Walk(const Columns& c, const Tile& t, const float* from, void* index)
      : c(c), t(t), index(static_cast<Code*>(index)), columns(c.n * D), result(c.n * D),
        bias(static_cast<std::size_t>(c.k * C::half)) {
    columns.load(from + t.row * c.n * D, t.lanes);
  }

  GPTVQ_INLINE const float* book(int64_t i) const { return c.centroids + (t.group * c.strips + c.strip[i]) * c.k * D; }

  GPTVQ_INLINE Vec scale(int64_t i) const {
    Vec s = Vec{} + 1.f;
    if (c.scale)
      for (int l = 0; l < t.lanes; ++l) s[l] = c.scale[(t.row + l) * c.n + i];
    return s;
  }

  GPTVQ_INLINE Int code(int64_t i) const {
    Int at = {};
    for (int l = 0; l < t.lanes; ++l) at[l] = index[(t.row + l) * c.n + i];
    return at;
  }

  GPTVQ_INLINE void centroids(int64_t i, Int at, Vec* q) const {
    const float* from = book(i);
    for (int a = 0; a < D; ++a) {
      float lanes[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const auto code = static_cast<Code>(at[l]);
        lanes[l] = C::with_sign(from[C::number(code) * D + a], code, a);
      }
      __builtin_memcpy(&q[a], lanes, sizeof(Vec));
    }
  }

  // Writes argmin_k (y - c_k)^T M (y - c_k) for every lane, the first of equals, and returns those centroids.
  GPTVQ_INLINE void assign(int64_t i, const Vec* y, const float* M, Vec* q) {
    const float* from = book(i);
    for (int64_t j = 0; j < c.k; ++j)
      for (int s = 0; s < C::half; ++s) {
        float sum = 0.f;
        for (int a = 0; a < D; ++a)
          for (int b = 0; b < D; ++b) {
            const float part = from[j * D + a] * M[a * D + b] * from[j * D + b];
            sum += (s >> a ^ s >> b) & 1 ? -part : part;
          }
        bias[static_cast<std::size_t>(j * C::half + s)] = sum;
      }
    Vec pull[D];
    for (int a = 0; a < D; ++a) {
      pull[a] = Vec{};
      for (int b = 0; b < D; ++b) pull[a] += y[b] * (-2.f * M[b * D + a]);
    }
    Int at = {};
    if constexpr (Signs) at = nearest_with_signs(from, pull);
    else at = nearest(from, pull);
    for (int l = 0; l < t.lanes; ++l) index[(t.row + l) * c.n + i] = static_cast<Code>(at[l]);
    centroids(i, at, q);
  }

  GPTVQ_INLINE Int nearest(const float* from, const Vec* pull) const {
    Vec best = Vec{} + std::numeric_limits<float>::max();
    Int at = {};
    for (int64_t j = 0; j < c.k; ++j) {
      Vec score = pull[0] * from[j * D] + bias[static_cast<std::size_t>(j)];
      for (int a = 1; a < D; ++a) score += pull[a] * from[j * D + a];
      const Int less = score < best;
      best = less ? score : best;
      at = less ? Int{} + static_cast<std::int32_t>(j) : at;
    }
    return at;
  }

  // c^T M c is the same for a change of sign and its opposite, and what y pulls is the opposite: the better of the two takes that off.
  GPTVQ_INLINE Int nearest_with_signs(const float* from, const Vec* pull) const {
    static_assert(D == 4 || !Signs, "changes of the first three signs, and their opposites");
    Vec best = Vec{} + std::numeric_limits<float>::max(), pulled = {};
    Int at = {};
    for (int64_t j = 0; j < c.k; ++j) {
      const Vec p[] = {pull[0] * from[j * D], pull[1] * from[j * D + 1], pull[2] * from[j * D + 2], pull[3] * from[j * D + 3]};
      const Vec sum = p[0] + p[1], difference = p[0] - p[1], end[] = {p[3] + p[2], p[3] - p[2]};
      for (int s = 0; s < C::half; ++s) {
        const Vec& first = s == 0 || s == 3 || s == 4 || s == 7 ? sum : difference;
        const Vec total = s & 1 ? end[s / 4] - first : end[s / 4] + first;
        const Vec score = bias[static_cast<std::size_t>(j * C::half + s)] - (Vec)((Int)total & 0x7fffffff);
        const Int less = score < best;
        best = less ? score : best;
        pulled = less ? total : pulled;
        at = less ? Int{} + static_cast<std::int32_t>(s << 8 | j) : at;
      }
    }
    return pulled > 0.f ? at ^ 0xf00 : at;
  }

  // Takes change times the rows of `factor` [n D, n D] that belong to vector i from all later columns.
  GPTVQ_INLINE void propagate(int64_t i, const Vec* change, const float* factor) {
    for (int b = 0; b < D; ++b) result.set(i * D + b, change[b]);
    for (int64_t j = (i + 1) * D; j < c.n * D; ++j) {
      Vec later = columns.get(j);
      for (int b = 0; b < D; ++b) later -= change[b] * factor[(i * D + b) * c.n * D + j];
      columns.set(j, later);
    }
  }

  GPTVQ_INLINE void store(float* to) const { result.store(to + t.row * c.n * D, t.lanes); }
};

template <int D, bool Signs>
GPTVQ_INLINE void column_tile(const Columns& c, const Tile& t, const float* W, const float* U, const float* roots,
                              void* index, float* E) {
  Walk<D, Signs> walk(c, t, W, index);
  const bool stale = c.stale && c.scale;
  Lines start(stale ? c.n * D : 0);
  if (stale) start.load(W + t.row * c.n * D, t.lanes);
  for (int64_t i = 0; i < c.n; ++i) {
    const float* L = roots + i * D * D;
    float M[D * D];
    for (int a = 0; a < D; ++a)
      for (int b = 0; b < D; ++b) {
        M[a * D + b] = 0.f;
        for (int m = 0; m < D; ++m) M[a * D + b] += L[a * D + m] * L[b * D + m];
      }
    const Vec s = walk.scale(i);
    Vec x[D], y[D], q[D], error[D];
    for (int a = 0; a < D; ++a) {
      x[a] = walk.columns.get(i * D + a);
      y[a] = (stale ? start.get(i * D + a) : x[a]) / s;
      error[a] = Vec{};
    }
    walk.assign(i, y, M, q);
    for (int a = 0; a < D; ++a)
      for (int b = 0; b < D; ++b) error[b] += (x[a] - q[a] * s) * L[a * D + b];
    walk.propagate(i, error, U);
  }
  walk.store(E);
}

// Inverse of a symmetric positive definite [D, D] matrix by Gauss-Jordan in double.
template <int D>
GPTVQ_INLINE void invert(const float* from, float* to) {
  double A[D][2 * D];
  for (int a = 0; a < D; ++a)
    for (int b = 0; b < D; ++b) A[a][b] = from[a * D + b], A[a][D + b] = a == b;
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

template <int D, bool Signs>
GPTVQ_INLINE void descent_tile(const Columns& c, const Tile& t, const float* R, const float* H, void* index, float* change) {
  Walk<D, Signs> walk(c, t, R, index);
  for (int64_t i = 0; i < c.n; ++i) {
    float h[D * D], inverse[D * D];
    for (int a = 0; a < D; ++a)
      for (int b = 0; b < D; ++b) h[a * D + b] = H[(i * D + a) * c.n * D + i * D + b];
    invert<D>(h, inverse);
    const Vec s = walk.scale(i);
    Vec q[D], y[D], step[D];
    walk.centroids(i, walk.code(i), q);
    for (int a = 0; a < D; ++a) {
      step[a] = Vec{};
      for (int b = 0; b < D; ++b) step[a] += walk.columns.get(i * D + b) * inverse[a * D + b];
      y[a] = q[a] + step[a] / s;
    }
    Vec best[D];
    walk.assign(i, y, h, best);
    for (int a = 0; a < D; ++a) step[a] = (best[a] - q[a]) * s;
    walk.propagate(i, step, H);
  }
  walk.store(change);
}

#define GPTVQ_TILES(name, D, Signs)                                                                                                     \
  GPTVQ_PER_ISA(column_tile_##name,                                                                                                     \
                (const Columns& c, const Tile& t, const float* W, const float* U, const float* roots, void* index, float* E),           \
                (column_tile<D, Signs>(c, t, W, U, roots, index, E)))                                                                   \
  GPTVQ_PER_ISA(descent_tile_##name, (const Columns& c, const Tile& t, const float* R, const float* H, void* index, float* change),     \
                (descent_tile<D, Signs>(c, t, R, H, index, change)))
GPTVQ_TILES(1, 1, false)
GPTVQ_TILES(2, 2, false)
GPTVQ_TILES(4, 4, false)
GPTVQ_TILES(signed, 4, true)

template <int D, bool Signs>
void decode_row(const Columns& c, int64_t row, const int64_t* at, const void* codes, float* Q) {
  using C = Codes<Signs>;
  const float* books = c.centroids + row / c.group_rows * c.strips * c.k * D;
  const float* scale = c.scale ? c.scale + row * c.n : nullptr;
  const auto* index = static_cast<const typename C::Type*>(codes) + row * c.n;
  Q += row * c.n * D;
  for (int64_t i = 0; i < c.n; ++i) {
    const float* centroid = books + at[i] + C::number(index[i]) * D;
    for (int a = 0; a < D; ++a) Q[i * D + a] = C::with_sign(centroid[a], index[i], a);
  }
  if (scale)
    for (int64_t i = 0; i < c.n; ++i)
      for (int a = 0; a < D; ++a) Q[i * D + a] *= scale[i];
}

template <int F, bool Signs>            // f values per vector, known to the compiler where F > 0
void collect_row(const Columns& c, int64_t row, int64_t f, const int64_t* at, const void* codes, const float* values, double* books) {
  using C = Codes<Signs>;
  const int64_t count = F > 0 ? F : f;
  const auto* index = static_cast<const typename C::Type*>(codes) + row * c.n;
  values += row * c.n * count;
  for (int64_t i = 0; i < c.n; ++i) {
    double* to = books + at[i] + C::number(index[i]) * count;
    for (int64_t a = 0; a < count; ++a) {
      const float once = C::with_sign(values[i * count + a], index[i], a % 4);      // of a form both its weights' signs
      to[a] += count == 16 ? C::with_sign(once, index[i], a / 4) : once;
    }
  }
}

// Where the codebook of each vector begins among those of its row group, with `width` numbers per centroid.
std::vector<int64_t> book_starts(const Columns& c, int64_t width) {
  std::vector<int64_t> at(static_cast<std::size_t>(c.n));
  for (int64_t i = 0; i < c.n; ++i) at[static_cast<std::size_t>(i)] = c.strip[i] * c.k * width;
  return at;
}

}  // namespace

void column_block(const Columns& c, const float* W, const float* U, const float* roots, void* index, float* E, int threads) {
  const std::vector<Tile> tiles = tiles_of(c);
  const auto tile = c.is_signed ? column_tile_signed : c.d == 1 ? column_tile_1 : c.d == 2 ? column_tile_2 : column_tile_4;
  parallel_for(static_cast<int64_t>(tiles.size()), threads,
               [&](int64_t i) { tile(c, tiles[static_cast<std::size_t>(i)], W, U, roots, index, E); });
}

void descent_block(const Columns& c, const float* R, const float* H, void* index, float* change, int threads) {
  const std::vector<Tile> tiles = tiles_of(c);
  const auto tile = c.is_signed ? descent_tile_signed : c.d == 1 ? descent_tile_1 : c.d == 2 ? descent_tile_2 : descent_tile_4;
  parallel_for(static_cast<int64_t>(tiles.size()), threads,
               [&](int64_t i) { tile(c, tiles[static_cast<std::size_t>(i)], R, H, index, change); });
}

void decode(const Columns& c, const void* index, float* Q, int threads) {
  constexpr int64_t kRows = 16;
  const std::vector<int64_t> at = book_starts(c, c.d);
  const auto one = c.is_signed ? decode_row<4, true> : c.d == 1 ? decode_row<1, false> : c.d == 2 ? decode_row<2, false> : decode_row<4, false>;
  parallel_for((c.rows + kRows - 1) / kRows, threads, [&](int64_t part) {
    for (int64_t row = part * kRows; row < std::min(c.rows, (part + 1) * kRows); ++row) one(c, row, at.data(), index, Q);
  });
}

void collect(const Columns& c, const void* index, const float* values, int64_t f, double* sums, int threads) {
  const std::vector<int64_t> at = book_starts(c, f);
  const auto one = c.is_signed ? (f == 4 ? collect_row<4, true> : collect_row<16, true>)
                   : f == 1 ? collect_row<1, false> : f == 2 ? collect_row<2, false> : f == 4 ? collect_row<4, false> : collect_row<0, false>;
  parallel_for(c.groups, threads, [&](int64_t group) {        // a group's sums are its own: one thread, rows in order
    double* books = sums + group * c.strips * c.k * f;
    std::fill_n(books, c.strips * c.k * f, 0.0);
    for (int64_t row = group * c.group_rows; row < std::min(c.rows, (group + 1) * c.group_rows); ++row)
      one(c, row, f, at.data(), index, values, books);
  });
}

}  // namespace gptvq
