// Fitting of codebooks: weighted k-means from several starts.  A lane is a point, so that a centroid is a broadcast and the
// argmin over centroids needs no horizontal step.  A group is one thread's: nothing depends on the number of threads.
//
// With d dimensions a distance takes d + d (d + 1) / 2 products.  Where enough points have the same metric up to their weight, they lie
// in lanes side by side: c^T M c is then theirs together, and d products are left.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "common/aligned.h"
#include "common/parallel.h"
#include "cpu/quantize.h"
#include "cpu/simd.h"

namespace gptvq {
namespace {

using std::int64_t;

// One group: (x-c)^T M (x-c) = spread + features . (c, products of c), M = weight times the metric.  Points have places: one metric's
// behind the other's, each filled up to whole vectors, where they are `sorted`, else in their own order.
template <int D>
struct Group {
  static constexpr int F = D + D * (D + 1) / 2, kRecord = D == 1 ? 2 : D == 2 ? 8 : 16;

  const float* x;                   // [points, D]
  const float* metric;              // [metrics, D, D]
  int64_t points, k, metrics, per_metric;
  bool sorted;
  int64_t padded;
  std::vector<std::int32_t> place;  // of each point
  Aligned<float> features;          // [F or, where sorted, D; padded], for the E-step; there without the weight
  Aligned<float> weights;           // [padded], where sorted
  Aligned<float> records;           // [points, kRecord]: features of the points, for the M-step
  Aligned<float> spread, value;     // [padded]
  Aligned<std::int32_t> index;      // [padded]
  Aligned<double> sums;             // [k, kRecord]
  Aligned<float> psi, squares;      // [k, F], or where sorted [F - D, k]; c^T M c [k]

  Group(const Points& p, int64_t g)
      : x(p.x + g * p.points * D), metric(p.metric), points(p.points), k(p.k), metrics(p.metrics), per_metric(points / metrics),
        sorted(D > 1 && whole(per_metric) * (D + 4) < per_metric * (F + 3)),      // operations on a centroid, of the comparison too
        padded(sorted ? metrics * whole(per_metric) : whole(points)), place(static_cast<std::size_t>(points)),
        features((sorted ? D : F) * padded), weights(sorted ? padded : 0), records(kRecord * points), spread(padded), value(padded),
        index(padded), sums(kRecord * k), psi(F * k), squares(k) {}

  static int64_t whole(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
  int64_t at(int64_t n) const { return place[static_cast<std::size_t>(n)]; }

  GPTVQ_INLINE void prepare(const float* weight) {
    std::fill_n(features.data(), (sorted ? D : F) * padded, 0.f);
    std::fill_n(weights.data(), sorted ? padded : 0, 0.f);
    std::fill_n(records.data(), kRecord * points, 0.f);
    std::fill_n(spread.data(), padded, 0.f);
    for (int64_t n = 0; n < points; ++n) {
      const float* M = metric + n % metrics * D * D;
      const int64_t at = sorted ? n % metrics * whole(per_metric) + n / metrics : n;
      place[static_cast<std::size_t>(n)] = static_cast<std::int32_t>(at);
      float* to = &records[n * kRecord];
      int f = D;
      for (int a = 0; a < D; ++a) {
        float pull = 0.f;
        for (int b = 0; b < D; ++b) pull += M[a * D + b] * x[n * D + b];
        if (sorted) features[a * padded + at] = -2 * pull;
        pull *= weight[n];
        to[a] = -2 * pull;
        spread[at] += pull * x[n * D + a];
        for (int b = a; b < D; ++b) to[f++] = weight[n] * M[a * D + b] * (a == b ? 1 : 2);
      }
      if (sorted) weights[at] = weight[n];
      else
        for (f = 0; f < F; ++f) features[f * padded + at] = to[f];
    }
  }

  // Assigns every point; returns whether any index changed.
  GPTVQ_INLINE bool e_step(const float* c) { return sorted ? e_step_by_metric(c) : e_step_by_point(c); }

  GPTVQ_INLINE bool e_step_by_point(const float* c) {
    for (int64_t i = 0; i < k; ++i) {
      int f = D;
      for (int a = 0; a < D; ++a) {
        psi[i * F + a] = c[i * D + a];
        for (int b = a; b < D; ++b) psi[i * F + f++] = c[i * D + a] * c[i * D + b];
      }
    }
    Int changed = {};
    for (int64_t n = 0; n < padded; n += kLanes) {
      Vec phi[F];
      for (int f = 0; f < F; ++f) __builtin_memcpy(&phi[f], &features[f * padded + n], sizeof(Vec));
      Vec best = Vec{} + std::numeric_limits<float>::max();
      Int at = {};
      for (int64_t i = 0; i < k; ++i) {
        Vec score = phi[0] * psi[i * F];
        for (int f = 1; f < F; ++f) score += phi[f] * psi[i * F + f];
        const Int less = score < best;
        best = less ? score : best;
        at = less ? Int{} + static_cast<std::int32_t>(i) : at;
      }
      changed |= take(n, at, best);
    }
    return any(changed);
  }

  GPTVQ_INLINE bool e_step_by_metric(const float* c) {
    int f = 0;
    for (int a = 0; a < D; ++a)
      for (int b = a; b < D; ++b, ++f)
        for (int64_t i = 0; i < k; ++i) psi[f * k + i] = c[i * D + a] * c[i * D + b];
    Int changed = {};
    for (int64_t m = 0; m < metrics; ++m) {
      square(metric + m * D * D);
      for (int64_t n = m * whole(per_metric); n < (m + 1) * whole(per_metric); n += kLanes) {
        Vec phi[D], weight;
        for (int a = 0; a < D; ++a) __builtin_memcpy(&phi[a], &features[a * padded + n], sizeof(Vec));
        __builtin_memcpy(&weight, &weights[n], sizeof(Vec));
        Vec best = Vec{} + std::numeric_limits<float>::max();
        Int at = {};
        for (int64_t i = 0; i < k; ++i) {
          Vec score = phi[0] * c[i * D] + squares[i];
          for (int a = 1; a < D; ++a) score += phi[a] * c[i * D + a];
          const Int less = score < best;
          best = less ? score : best;
          at = less ? Int{} + static_cast<std::int32_t>(i) : at;
        }
        changed |= take(n, weight > 0.f ? at : Int{}, best * weight);        // a point without weight stays with the first
      }
    }
    return any(changed);
  }

  // squares [k] = c^T M c.
  GPTVQ_INLINE void square(const float* M) {
    std::fill_n(squares.data(), k, 0.f);
    int f = 0;
    for (int a = 0; a < D; ++a)
      for (int b = a; b < D; ++b, ++f) {
        const float factor = M[a * D + b] * (a == b ? 1 : 2);
        for (int64_t i = 0; i < k; ++i) squares[i] += factor * psi[f * k + i];
      }
  }

  // Notes what the places from `n` on chose; returns where that is new.
  GPTVQ_INLINE Int take(int64_t n, Int at, Vec best) {
    Int before;
    __builtin_memcpy(&before, &index[n], sizeof(Int));
    __builtin_memcpy(&index[n], &at, sizeof(Int));
    __builtin_memcpy(&value[n], &best, sizeof(Vec));
    return at != before;
  }

  static GPTVQ_INLINE bool any(Int lanes) {
    std::int32_t found = 0;
    for (int l = 0; l < kLanes; ++l) found |= lanes[l];
    return found != 0;
  }

  // c_k = (sum M)^-1 sum M x in double; a centroid without weight moves to the point farthest from its own.
  GPTVQ_INLINE void m_step(float* c) {
    std::fill_n(sums.data(), kRecord * k, 0.0);
    for (int64_t n = 0; n < points; ++n) {
      const float* from = &records[n * kRecord];
      double* to = &sums[index[at(n)] * kRecord];
      for (int f = 0; f < kRecord; ++f) to[f] += from[f];         // a record is padded to whole vectors
    }
    std::vector<int64_t> empty;
    for (int64_t i = 0; i < k; ++i) {
      const double* s = &sums[i * kRecord];
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

  double distance(int64_t n) const { return spread[at(n)] + value[at(n)]; }

  void reseed(const std::vector<int64_t>& empty, float* c) const {
    std::vector<int64_t> far(static_cast<std::size_t>(points));
    std::iota(far.begin(), far.end(), 0);
    const std::size_t count = std::min(empty.size(), far.size());
    std::partial_sort(far.begin(), far.begin() + static_cast<std::ptrdiff_t>(count), far.end(), [&](int64_t a, int64_t b) {
      return distance(a) > distance(b) || (distance(a) == distance(b) && a < b);
    });
    for (std::size_t j = 0; j < count && distance(far[j]) > 0; ++j)
      std::copy_n(x + far[j] * D, D, c + empty[j] * D);
  }

  // Moves c [k, D] by up to `iterations` steps; returns the loss that its last assignment had.
  GPTVQ_INLINE double climb(float* c, int64_t iterations) {
    std::fill_n(index.data(), padded, -1);
    for (int64_t i = 0; i < iterations && e_step(c); ++i) m_step(c);
    double loss = 0;
    for (int64_t n = 0; n < points; ++n) loss += distance(n);
    return loss;
  }
};

template <int D>
GPTVQ_INLINE void fit_group(const Points& p, int64_t g, const float* seeds, const std::vector<Round>& rounds, float* centroids) {
  const int64_t size = p.k * D;
  Group<D> group(p, g);
  group.prepare(p.weight + g * p.points);
  std::vector<float> tried(static_cast<std::size_t>(p.starts * size));
  std::vector<std::pair<double, int64_t>> left;
  for (int64_t s = 0; s < p.starts; ++s) {
    std::copy_n(seeds + (s * p.groups + g) * size, size, &tried[static_cast<std::size_t>(s * size)]);
    left.emplace_back(0, s);
  }
  for (const Round& round : rounds) {
    for (auto& [loss, s] : left) loss = group.climb(&tried[static_cast<std::size_t>(s * size)], round.iterations);
    std::sort(left.begin(), left.end());
    left.resize(std::min(left.size(), static_cast<std::size_t>(round.keep)));
  }
  std::copy_n(&tried[static_cast<std::size_t>(left[0].second * size)], size, centroids + g * size);
}

#define GPTVQ_FIT_GROUP(D)                                                                                                        \
  GPTVQ_PER_ISA(fit_group_##D,                                                                                                    \
                (const Points& p, int64_t g, const float* seeds, const std::vector<Round>& rounds, float* centroids),             \
                fit_group<D>(p, g, seeds, rounds, centroids))
GPTVQ_FIT_GROUP(1)
GPTVQ_FIT_GROUP(2)
GPTVQ_FIT_GROUP(4)

}  // namespace

void fit(const Points& p, const float* seeds, const std::vector<Round>& rounds, float* centroids, int threads) {
  const auto group = p.d == 1 ? fit_group_1 : p.d == 2 ? fit_group_2 : fit_group_4;
  parallel_for(p.groups, threads, [&](int64_t g) { group(p, g, seeds, rounds, centroids); });
}

}  // namespace gptvq
