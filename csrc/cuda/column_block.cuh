// Assignment of codes within a block of up to 128 columns, vector after vector, in one launch.
//
//   thread block = a tile of up to 32 rows, for all columns of the block;  team = 8 lanes, which hold 2 rows:
//
//     slot          0                    1              ..         lane l of a team holds the vectors l, 8 + l, 16 + l ..
//     vector   0 1 2 .. 7        8 9 10 .. 15                      in registers; the columns of slot 0 are the next ones, and
//     lane     0 1 2 .. 7        0 1  2 ..  7                      after 8 vectors all slots move up.
//
// A step broadcasts the current vector in its team, shares the centroids out among the lanes (lane l has the codes
// [l per, l per + per), so that the lowest lane that reaches the minimum has the first of equals), and takes what the choice
// changes from all later columns.  Meanwhile the block loads what the next step reads, the rows of U or H that belong to its
// vector and the codebooks of its strip with c^T M c beside each centroid, into the other half of shared memory: one
// barrier a step.  Every sum has a fixed order.
//
// kSigned: 256 centroids, each under all 16 changes of sign (`Scores`); a code has the signs above the centroid's number.
#pragma once
#include <type_traits>

#include "cuda/vector.cuh"

namespace gptvq {

constexpr int kBlockCols = 128;                     // of a block at most, and threads of a thread block
constexpr int kTeam = 8, kTeamRows = 2, kTileRows = kBlockCols / kTeam * kTeamRows;
constexpr int kEntries = 512;                       // centroids of a tile, all its row groups together, at most

struct ColumnArgs {
  int rows, n, k, groups, strips, group_rows;
  int tile, tile_groups, per;                       // rows and row groups of a tile at most, centroids of a lane
  const float *from, *factor, *roots, *centroids, *scale;
  const float* start;                               // column_block: assigns these weights instead of what is left of them
  std::int64_t from_stride, factor_stride, scale_stride, start_stride;
  const std::int64_t* strip;
  void* index;                                      // uint8, or uint16 with signs
  float* result;
};

// What to add to x^T M x for the squared distance of x from a centroid, given `pull` = -2 M x.
template <int D, bool kSigned>
struct Scores {
  float square;

  __device__ __forceinline__ void load(const Form<D>& form, const Vec<D>& c) { square = form.square(c); }
  __device__ __forceinline__ void never() { square = INFINITY; }
  __device__ __forceinline__ float least(const Vec<D>& pull, const Vec<D>& c) const { return score<D>(pull, c, square); }
};

// Of the best of a centroid's 16 changes of sign.  One and its opposite have the same square, and opposite products with the pull: the
// better of the two has square - |product|.  So there are 8 to compare, by those that leave the last weight as it is.
template <>
struct alignas(16) Scores<4, true> {
  float square[8];                                  // bit a of the number: weight a is negated

  __device__ __forceinline__ void load(const Form<4>& form, const Vec<4>& c) {
#pragma unroll
    for (int p = 0; p < 8; ++p) square[p] = form.square(with_signs<4>(c, static_cast<unsigned>(p)));
  }
  __device__ __forceinline__ void never() {
#pragma unroll
    for (int p = 0; p < 8; ++p) square[p] = INFINITY;
  }
  // Always the same bits for the same arguments: every fused step is asked for by name, and no other can be.
  static __device__ __forceinline__ void products(const Vec<4>& pull, const Vec<4>& c, float (&product)[8]) {
    const float second = __fmul_rn(pull.v[1], c.v[1]), fourth = __fmul_rn(pull.v[3], c.v[3]);
    const float low[2] = {fmaf(pull.v[0], c.v[0], second), fmaf(-pull.v[0], c.v[0], second)};
    const float high[2] = {fmaf(pull.v[2], c.v[2], fourth), fmaf(-pull.v[2], c.v[2], fourth)};
#pragma unroll
    for (int p = 0; p < 8; ++p) product[p] = high[p / 4] + (p & 2 ? -low[1 - p % 2] : low[p % 2]);
  }
  __device__ __forceinline__ float least(const Vec<4>& pull, const Vec<4>& c) const {
    float product[8];
    products(pull, c, product);
    float best = square[0] - fabsf(product[0]);
#pragma unroll
    for (int p = 1; p < 8; ++p) best = fminf(best, square[p] - fabsf(product[p]));
    return best;
  }
  // The signs that reach `least`.
  __device__ __forceinline__ unsigned signs(const Vec<4>& pull, const Vec<4>& c, float least) const {
    float product[8];
    products(pull, c, product);
    unsigned found = 0;
#pragma unroll
    for (unsigned p = 8; p-- > 0;)
      if (square[p] - fabsf(product[p]) == least) found = product[p] > 0 ? 15 - p : p;
    return found;
  }
};

template <int D, bool kSigned>
struct ColumnShared {
  static constexpr int kVectors = kBlockCols / D;
  Vec<D> book[2][kEntries];                         // centroid l per + j of a row group is entry 8 j + l of the group's
  Vec<D> factor[2][D][kVectors];
  Scores<D, kSigned> scores[2][kEntries];
  float metric[kVectors][D * D], other[kVectors][D * D];      // of each vector: M, and the root or the inverse of M
  int strip[kVectors];
};

// In place, by Gauss-Jordan, symmetric positive definite.
template <int D>
__device__ __forceinline__ void invert(double (&A)[D][D]) {
#pragma unroll
  for (int p = 0; p < D; ++p) {
    const double pivot = 1 / A[p][p];
    A[p][p] = 1;
#pragma unroll
    for (int b = 0; b < D; ++b) A[p][b] *= pivot;
#pragma unroll
    for (int a = 0; a < D; ++a) {
      if (a == p) continue;
      const double f = A[a][p];
      A[a][p] = 0;
#pragma unroll
      for (int b = 0; b < D; ++b) A[a][b] -= f * A[p][b];
    }
  }
}

// The matrices of vector i: M = L L^T and L from L = U_PP^-1, or M = H_PP and its inverse.
template <int D, bool kDescend, bool kSigned>
__device__ __forceinline__ void prepare_vector(const ColumnArgs& a, ColumnShared<D, kSigned>& s, int i) {
  const std::int64_t strip = a.strip[i];
  s.strip[i] = strip < 0 ? 0 : strip < a.strips ? static_cast<int>(strip) : a.strips - 1;
  if (kDescend) {
    double A[D][D];
#pragma unroll
    for (int p = 0; p < D; ++p)
#pragma unroll
      for (int q = 0; q < D; ++q) {
        s.metric[i][p * D + q] = a.factor[(i * D + p) * a.factor_stride + i * D + q];
        A[p][q] = s.metric[i][p * D + q];
      }
    invert<D>(A);
#pragma unroll
    for (int p = 0; p < D; ++p)
#pragma unroll
      for (int q = 0; q < D; ++q) s.other[i][p * D + q] = static_cast<float>(A[p][q]);
  } else {
    const float* L = a.roots + i * D * D;
#pragma unroll
    for (int p = 0; p < D; ++p)
#pragma unroll
      for (int q = 0; q < D; ++q) {
        float sum = 0.f;
#pragma unroll
        for (int m = 0; m < D; ++m) sum = fmaf(L[p * D + m], L[q * D + m], sum);
        s.metric[i][p * D + q] = sum;
        s.other[i][p * D + q] = L[p * D + q];
      }
  }
}

// What a thread carries from global memory to the shared memory of the next step.
template <int D, bool kSigned>
struct Load {
  static constexpr int kEach = kEntries / kBlockCols;
  int from[kEach];                // of its entries, from the first centroid of the tile's first group and the step's strip; -1: none
  Vec<D> centroid[kEach];
  float factor[D];

  __device__ __forceinline__ void plan(const ColumnArgs& a, int first_group) {
    const int entries = a.per * kTeam;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int entry = e * kBlockCols + static_cast<int>(threadIdx.x), group = entry / entries, at = entry % entries;
      const int code = at % kTeam * a.per + at / kTeam;
      const bool exists = group < a.tile_groups && first_group + group < a.groups && code < a.k;
      from[e] = exists ? (group * a.strips * a.k + code) * D : -1;
    }
  }

  __device__ __forceinline__ void fetch(const ColumnArgs& a, const ColumnShared<D, kSigned>& s, int first_group, int i) {
    const int col = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int b = 0; b < D; ++b)
      factor[b] = col >= (i + 1) * D && col < a.n * D ? a.factor[(i * D + b) * a.factor_stride + col] : 0.f;
    const float* book = a.centroids + (static_cast<std::int64_t>(first_group) * a.strips + s.strip[i]) * a.k * D;
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      if (from[e] >= 0) centroid[e] = *reinterpret_cast<const Vec<D>*>(book + from[e]);
  }

  __device__ __forceinline__ void put(const ColumnArgs& a, ColumnShared<D, kSigned>& s, int i) const {
    const int half = i & 1, col = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int b = 0; b < D; ++b) s.factor[half][b][col / D].v[col % D] = factor[b];
    Form<D> form;
    form.load(s.metric[i]);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (e * kBlockCols >= a.tile_groups * a.per * kTeam) break;
      const int entry = e * kBlockCols + col;
      if (from[e] >= 0) {
        s.book[half][entry] = centroid[e];
        s.scores[half][entry].load(form, centroid[e]);
      } else {                    // never the least
        s.book[half][entry] = Vec<D>{};
        s.scores[half][entry].never();
      }
    }
  }
};

// Best of the lane's centroids for each of the team's rows: value, and which of the lane's.
template <int D, bool kSame, bool kSigned>
__device__ __forceinline__ void scan(const ColumnShared<D, kSigned>& s, int half, int per, const int (&first)[kTeamRows],
                                     const Vec<D> (&pull)[kTeamRows], float (&best)[kTeamRows], int (&at)[kTeamRows]) {
#pragma unroll 2
  for (int j = 0; j < per; ++j) {
    Vec<D> c = s.book[half][first[0] + j * kTeam];
    Scores<D, kSigned> scores = s.scores[half][first[0] + j * kTeam];
#pragma unroll
    for (int m = 0; m < kTeamRows; ++m) {
      if (!kSame && m > 0) {
        c = s.book[half][first[m] + j * kTeam];
        scores = s.scores[half][first[m] + j * kTeam];
      }
      const float value = scores.least(pull[m], c);
      const bool less = value < best[m];
      best[m] = less ? value : best[m];
      at[m] = less ? j : at[m];
    }
  }
}

template <int D>
__device__ __forceinline__ Vec<D> times(const Vec<D>& x, const float* M) {
  Vec<D> out;
#pragma unroll
  for (int b = 0; b < D; ++b) {
    out.v[b] = 0.f;
#pragma unroll
    for (int a = 0; a < D; ++a) out.v[b] = fmaf(x.v[a], M[a * D + b], out.v[b]);
  }
  return out;
}

// column_block: from = W, factor = U, result = E.  descent_block: from = R, factor = H, result = the change of Q; index in and out.
template <int D, bool kDescend, bool kSigned>
__global__ void __launch_bounds__(kBlockCols, 3) column_kernel(const ColumnArgs a) {
  using Code = std::conditional_t<kSigned, std::uint16_t, std::uint8_t>;
  constexpr int kSlots = kBlockCols / (kTeam * D);
  constexpr unsigned kAll = 0xffffffffu;
  using Shared = ColumnShared<D, kSigned>;
  GPTVQ_DYN_SMEM(Shared, shared);
  Shared& s = *shared;
  const int lane = static_cast<int>(threadIdx.x) % kTeam, team = static_cast<int>(threadIdx.x) / kTeam;
  const int first_row = static_cast<int>(blockIdx.x) * a.tile, first_group = first_row / a.group_rows;

  int row[kTeamRows], first[kTeamRows];             // first: the lane's first entry of the row's codebook
  bool live[kTeamRows];
  Vec<D> w[kTeamRows][kSlots];
#pragma unroll
  for (int m = 0; m < kTeamRows; ++m) {
    const int at = team * kTeamRows + m;
    row[m] = first_row + at;
    live[m] = at < a.tile && row[m] < a.rows;
    first[m] = (live[m] ? row[m] / a.group_rows - first_group : 0) * a.per * kTeam + lane;
#pragma unroll
    for (int t = 0; t < kSlots; ++t)
#pragma unroll
      for (int b = 0; b < D; ++b) {
        const int col = (t * kTeam + lane) * D + b;
        w[m][t].v[b] = live[m] && col < a.n * D ? a.from[row[m] * a.from_stride + col] : 0.f;
      }
  }

  Load<D, kSigned> load;
  load.plan(a, first_group);
  if (static_cast<int>(threadIdx.x) < a.n) prepare_vector<D, kDescend, kSigned>(a, s, static_cast<int>(threadIdx.x));
  __syncthreads();
  load.fetch(a, s, first_group, 0);
  load.put(a, s, 0);

  for (int slot = 0; slot * kTeam < a.n; ++slot) {
    const int mine = slot * kTeam + lane;           // the vector of this slot that the lane holds
    float size[kTeamRows], inverse[kTeamRows];
    int code[kTeamRows];                            // at first the entry of the code that was, its signs above the lowest 8 bits
#pragma unroll
    for (int m = 0; m < kTeamRows; ++m) {
      const bool exists = live[m] && mine < a.n;
      size[m] = exists && a.scale ? a.scale[row[m] * a.scale_stride + mine] : 1.f;
      inverse[m] = 1.f / size[m];
      code[m] = 0;
      if (kDescend && exists) {
        const int before = static_cast<Code*>(a.index)[static_cast<std::int64_t>(row[m]) * a.n + mine];
        const int number = kSigned ? before & 255 : before;
        code[m] = number < a.k ? number : a.k - 1;
        code[m] = code[m] % a.per * kTeam + code[m] / a.per;
        if constexpr (kSigned) code[m] |= before & 0xf00;
      }
    }
    for (int turn = 0; turn < kTeam && slot * kTeam + turn < a.n; ++turn) {
      const int i = slot * kTeam + turn, half = i & 1;
      __syncthreads();                              // step i is in shared memory, and nobody reads the other half any more
      if (i + 1 < a.n) load.fetch(a, s, first_group, i + 1);

      Form<D> form;
      form.load(s.metric[i]);
      Vec<D> x[kTeamRows], q[kTeamRows], pull[kTeamRows];
      float scale[kTeamRows], best[kTeamRows];
      int at[kTeamRows];
#pragma unroll
      for (int m = 0; m < kTeamRows; ++m) {
#pragma unroll
        for (int b = 0; b < D; ++b) x[m].v[b] = __shfl_sync(kAll, w[m][0].v[b], turn, kTeam);
        scale[m] = a.scale ? __shfl_sync(kAll, size[m], turn, kTeam) : 1.f;
        Vec<D> y = x[m];
        if (kDescend) {
          if constexpr (kSigned) {
            const int before = __shfl_sync(kAll, code[m], turn, kTeam);
            q[m] = with_signs<D>(s.book[half][first[m] - lane + (before & 255)], static_cast<unsigned>(before) >> 8);
          } else {
            q[m] = s.book[half][first[m] - lane + __shfl_sync(kAll, code[m], turn, kTeam)];
          }
          y = times<D>(x[m], s.other[i]);
        } else if (a.start && live[m]) {
#pragma unroll
          for (int b = 0; b < D; ++b) y.v[b] = a.start[row[m] * a.start_stride + i * D + b];
        }
        if (a.scale) {
          const float over = __shfl_sync(kAll, inverse[m], turn, kTeam);
#pragma unroll
          for (int b = 0; b < D; ++b) y.v[b] *= over;
        }
        if (kDescend)
#pragma unroll
          for (int b = 0; b < D; ++b) y.v[b] += q[m].v[b];
        pull[m] = form.pull(y);
        best[m] = INFINITY;
        at[m] = 0;
      }
      if (first[0] == first[kTeamRows - 1])
        scan<D, true, kSigned>(s, half, a.per, first, pull, best, at);
      else
        scan<D, false, kSigned>(s, half, a.per, first, pull, best, at);

      Vec<D> change[kTeamRows];
#pragma unroll
      for (int m = 0; m < kTeamRows; ++m) {
        float least = best[m];
#pragma unroll
        for (int o = kTeam / 2; o > 0; o /= 2) least = fminf(least, __shfl_xor_sync(kAll, least, o, kTeam));
        const unsigned reached = __ballot_sync(kAll, best[m] == least) >> (threadIdx.x % 32 / kTeam * kTeam) & ((1u << kTeam) - 1);
        const int winner = __ffs(static_cast<int>(reached)) - 1;
        const int j = __shfl_sync(kAll, at[m], winner, kTeam);
        const int entry = first[m] - lane + j * kTeam + winner;
        Vec<D> c = s.book[half][entry];
        unsigned signs = 0;
        if constexpr (kSigned) {
          signs = s.scores[half][entry].signs(pull[m], c, least);
          c = with_signs<D>(c, signs);
        }
        if (kDescend) {
#pragma unroll
          for (int b = 0; b < D; ++b) change[m].v[b] = (c.v[b] - q[m].v[b]) * scale[m];
        } else {
#pragma unroll
          for (int b = 0; b < D; ++b) x[m].v[b] = fmaf(-c.v[b], scale[m], x[m].v[b]);
          change[m] = times<D>(x[m], s.other[i]);
        }
        if (lane == turn) {
          w[m][0] = change[m];
          code[m] = winner * a.per + j + static_cast<int>(signs << 8);
        }
      }
#pragma unroll
      for (int t = 0; t < kSlots; ++t) {
        if ((slot + t) * kTeam >= a.n) break;       // columns that have been visited take nothing: their factor is zero
#pragma unroll
        for (int b = 0; b < D; ++b) {
          const Vec<D> u = s.factor[half][b][(slot + t) * kTeam + lane];
#pragma unroll
          for (int m = 0; m < kTeamRows; ++m)
#pragma unroll
            for (int c = 0; c < D; ++c) w[m][t].v[c] = fmaf(-change[m].v[b], u.v[c], w[m][t].v[c]);
        }
      }
      if (i + 1 < a.n) load.put(a, s, i + 1);
    }
#pragma unroll
    for (int m = 0; m < kTeamRows; ++m) {
      if (live[m] && mine < a.n) {
        const std::int64_t to = static_cast<std::int64_t>(row[m]) * a.n + mine;
        reinterpret_cast<Vec<D>*>(a.result)[to] = w[m][0];
        static_cast<Code*>(a.index)[to] = static_cast<Code>(code[m]);
      }
#pragma unroll
      for (int t = 0; t + 1 < kSlots; ++t) w[m][t] = w[m][t + 1];
    }
  }
}

}  // namespace gptvq
