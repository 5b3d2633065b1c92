// Fitting of codebooks: weighted k-means from several starts.  A lane is a point, so that a centroid is a broadcast and the
// argmin over centroids needs no horizontal step.  A group is one thread's: nothing depends on the number of threads.
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

// One group: (x-c)^T M (x-c) = spread + features . (c, products of c), M = weight times the metric.
template <int D>
struct Group {
  static constexpr int F = D + D * (D + 1) / 2, kRecord = D == 1 ? 2 : D == 2 ? 8 : 16;

  const float* x;                   // [points, D]
  int64_t points, k, padded;
  Aligned<float> features;          // [F, padded], for the E-step
  Aligned<float> records;           // [points, kRecord]: the same, point by point, for the M-step
  Aligned<float> spread, value;     // [padded]
  Aligned<std::int32_t> index;      // [padded]
  Aligned<double> sums;             // [k, kRecord]
  Aligned<float> psi;               // [k, F]

  Group(const float* x, int64_t points, int64_t k)
      : x(x), points(points), k(k), padded((points + kLanes - 1) / kLanes * kLanes), features(F * padded), records(kRecord * points),
        spread(padded), value(padded), index(padded), sums(kRecord * k), psi(F * k) {}

  GPTVQ_INLINE void prepare(const float* metric, int64_t metrics, const float* weight) {
    std::fill_n(features.data(), F * padded, 0.f);
    std::fill_n(records.data(), kRecord * points, 0.f);
    std::fill_n(spread.data(), padded, 0.f);
    for (int64_t n = 0; n < points; ++n) {
      const float* M = metric + n % metrics * D * D;
      float* to = &records[n * kRecord];
      int f = D;
      for (int a = 0; a < D; ++a) {
        float pull = 0.f;
        for (int b = 0; b < D; ++b) pull += weight[n] * M[a * D + b] * x[n * D + b];
        to[a] = -2 * pull;
        spread[n] += pull * x[n * D + a];
        for (int b = a; b < D; ++b) to[f++] = weight[n] * M[a * D + b] * (a == b ? 1 : 2);
      }
      for (f = 0; f < F; ++f) features[f * padded + n] = to[f];
    }
  }

  // Assigns every point; returns whether any index changed.
  GPTVQ_INLINE bool e_step(const float* c) {
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
      Int at = {}, before;
      for (int64_t i = 0; i < k; ++i) {
        Vec score = phi[0] * psi[i * F];
        for (int f = 1; f < F; ++f) score += phi[f] * psi[i * F + f];
        const Int less = score < best;
        best = less ? score : best;
        at = less ? Int{} + static_cast<std::int32_t>(i) : at;
      }
      __builtin_memcpy(&before, &index[n], sizeof(Int));
      changed |= at != before;
      __builtin_memcpy(&index[n], &at, sizeof(Int));
      __builtin_memcpy(&value[n], &best, sizeof(Vec));
    }
    std::int32_t any = 0;
    for (int l = 0; l < kLanes; ++l) any |= changed[l];
    return any != 0;
  }

  // c_k = (sum M)^-1 sum M x in double; a centroid without weight moves to the point farthest from its own.
  GPTVQ_INLINE void m_step(float* c) {
    std::fill_n(sums.data(), kRecord * k, 0.0);
    for (int64_t n = 0; n < points; ++n) {
      const float* from = &records[n * kRecord];
      double* to = &sums[index[n] * kRecord];
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

  double distance(int64_t n) const { return spread[n] + value[n]; }

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
  Group<D> group(p.x + g * p.points * D, p.points, p.k);
  group.prepare(p.metric, p.metrics, p.weight + g * p.points);
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
