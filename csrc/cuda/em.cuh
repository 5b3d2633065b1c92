// EM of codebooks of 2 or 4 dimensions: a thread block takes one start of one group through all iterations of a round.
//
//   unit = P points (x, one below the other) of one vector column, hence of one metric M: a thread computes c^T M c once for
//   all of them, and each distance is a chain of D fused steps on -2 M x.  Centroids are read four at a time from shared
//   memory: the minimum of the four is compared with the best so far, and which one of them it was is found afterwards by
//   computing them again.  Strictly less both times, so the first of equals wins.
//
// Sums per centroid are 64-bit integers (values scaled by a power of two that the largest one fits into), as two 32-bit words
// with native shared atomics: exact, whatever the order, so they are kept from one iteration to the next, and only points
// whose index changed are moved.  `replicas` copies keep the lanes of a warp out of each other's way.
#pragma once
#include "cuda/vector.cuh"

namespace gptvq {

constexpr int kEmThreads = 512;                     // of a thread block at most

struct EmArgs {
  int groups, points, metrics, k, starts;
  int iterations, replicas;
  const float *x, *metric, *weight;
  float* centroids;                                 // [starts, groups, k, D], in and out
  double* loss;                                     // [starts, groups], or null
  std::uint8_t* index;                              // [groups, starts, points], or null: in shared memory
};

template <int D>
constexpr int kSums = D + D * (D + 1) / 2;          // sum of M x and of the upper triangle of M

// Shared memory of a thread block, in this order.
template <int D>
struct EmShared {
  std::uint64_t* reduce;      // [kEmThreads / 32]
  Vec<D>* book;               // [2, padded]: now and next; padded by copies of the last centroid to a multiple of 4
  unsigned *low, *high;       // [kSums, k, replicas]
  int* count;                 // [4]: points that changed in an even and in an odd iteration, centroids without points in each
  std::uint8_t* empty;        // [k]
  std::uint8_t* index;        // [points]

  __host__ __device__ static int padded(int k) { return (k + 3) / 4 * 4; }
  __host__ __device__ static std::int64_t bytes(int k, int replicas) {
    return 8 * (kEmThreads / 32) + 2 * padded(k) * 4 * D + 8 * std::int64_t{kSums<D>} * k * replicas + 16 + padded(k);
  }
  __device__ EmShared(unsigned char* from, const EmArgs& a) {
    reduce = reinterpret_cast<std::uint64_t*>(from);
    book = reinterpret_cast<Vec<D>*>(reduce + kEmThreads / 32);
    low = reinterpret_cast<unsigned*>(book + 2 * padded(a.k));
    high = low + kSums<D> * a.k * a.replicas;
    count = reinterpret_cast<int*>(high + kSums<D> * a.k * a.replicas);
    empty = reinterpret_cast<std::uint8_t*>(count + 4);
    index = a.index ? a.index + static_cast<std::int64_t>(blockIdx.x) * a.points : empty + padded(a.k);
  }
};

// The largest value of a thread block, in every thread.
__device__ __forceinline__ std::uint64_t block_max(std::uint64_t value, std::uint64_t* shared) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) {
    const std::uint64_t other = __shfl_xor_sync(0xffffffffu, value, o);
    value = other > value ? other : value;
  }
  __syncthreads();                                  // the previous result has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / 32; ++w) value = shared[w] > value ? shared[w] : value;
  return value;
}

__device__ __forceinline__ float block_max(float value, std::uint64_t* shared) {      // not negative: ordered as its bits are
  return __uint_as_float(static_cast<unsigned>(block_max(std::uint64_t{__float_as_uint(value)}, shared)));
}

// The sum over a thread block in a fixed order, in thread 0.
__device__ __forceinline__ double block_sum(double value, std::uint64_t* shared) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) value += __shfl_xor_sync(0xffffffffu, value, o);
  double* warps = reinterpret_cast<double*>(shared);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) value += warps[w];
  return value;
}

// A power of two in two factors: their product may lie outside float32, the scaled values do not.
struct Scale {
  float first, second;
  int exponent;

  // The largest with |value| scaled to at most 2^bits for |value| <= most.
  __device__ Scale(float most, int bits) : first(0.f), second(0.f), exponent(0) {
    if (!(most > 0.f)) return;
    int up;
    frexpf(most, &up);
    exponent = bits - up;
    first = ldexpf(1.f, exponent / 2);
    second = ldexpf(1.f, exponent - exponent / 2);
  }
  __device__ __forceinline__ long long fixed(float value) const { return llrintf(value * first * second); }
};

// Exact 64-bit addition from native 32-bit atomics: the old low word tells the carry.
__device__ __forceinline__ void accumulate(unsigned* low, unsigned* high, long long value) {
  const unsigned add = static_cast<unsigned>(value), old = atomicAdd(low, add);
  atomicAdd(high, static_cast<unsigned>(value >> 32) + (old + add < old ? 1u : 0u));
}

// The points of one group; `each` visits those of a thread, always the same ones in the same order.
template <int D, int P>
struct Group {
  const Vec<D>* x;
  const float *metric, *weight;
  int points, metrics, units;

  __device__ Group(const EmArgs& a, int group)
      : x(reinterpret_cast<const Vec<D>*>(a.x) + static_cast<std::int64_t>(group) * a.points), metric(a.metric),
        weight(a.weight + static_cast<std::int64_t>(group) * a.points), points(a.points), metrics(a.metrics),
        units((a.points / a.metrics + P - 1) / P * a.metrics) {}

  // f(M, number of the unit's first point); its j-th is `metrics` j further, and exists below `points`.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int unit = static_cast<int>(threadIdx.x); unit < units; unit += static_cast<int>(blockDim.x)) {
      const int column = unit % metrics;
      Form<D> form;
      form.load(metric + static_cast<std::int64_t>(column) * D * D);
      f(form, unit / metrics * P * metrics + column);
    }
  }

  // f(M, n) for every point n with weight.
  template <class F>
  __device__ __forceinline__ void each_point(F&& f) const {
    each([&](const Form<D>& form, int first) {
#pragma unroll 2
      for (int j = 0; j < P; ++j)
        if (exists(first + j * metrics)) f(form, first + j * metrics);
    });
  }

  __device__ __forceinline__ bool exists(int n) const { return n < points && weight[n] > 0.f; }

  // Squared distance of a point to c, not by the difference of large numbers.
  __device__ __forceinline__ float distance(const Form<D>& form, int n, const Vec<D>& c) const {
    Vec<D> delta = x[n];
#pragma unroll
    for (int b = 0; b < D; ++b) delta.v[b] -= c.v[b];
    return weight[n] * form.square(delta);
  }
};

template <int D>
__device__ __forceinline__ void move_point(const EmShared<D>& s, const EmArgs& a, const Form<D>& form, const Vec<D>& pull, float weight,
                                           int code, int before, const Scale& moment, const Scale& mass) {
  const int replica = static_cast<int>(threadIdx.x) & (a.replicas - 1);
  const auto add = [&](int f, long long value) {
    const int at = (f * a.k + code) * a.replicas + replica;
    accumulate(&s.low[at], &s.high[at], value);
    if (before >= 0) {
      const int was = (f * a.k + before) * a.replicas + replica;
      accumulate(&s.low[was], &s.high[was], -value);
    }
  };
  int f = 0;
#pragma unroll
  for (int p = 0; p < D; ++p) add(p, moment.fixed(-0.5f * weight * pull.v[p]));
#pragma unroll
  for (int p = 0; p < D; ++p)
#pragma unroll
    for (int q = p; q < D; ++q, ++f) add(D + f, mass.fixed(weight * (p == q ? form.m[f] : 0.5f * form.m[f])));
}

// Assigns all points; counts those whose index changed and moves them between the sums.
template <int D, int P>
__device__ __forceinline__ void e_step(const EmShared<D>& s, const EmArgs& a, const Group<D, P>& group, const Vec<D>* book, bool all,
                                       int* changed, const Scale& moment, const Scale& mass) {
  const int padded = EmShared<D>::padded(a.k);
  int moved = 0;
  group.each([&](const Form<D>& form, int first) {
    Vec<D> pull[P];
    float best[P];
    int at[P];
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const int n = first + j * a.metrics;
      pull[j] = form.pull(n < a.points ? group.x[n] : Vec<D>{});
      best[j] = INFINITY;
      at[j] = 0;
    }
#pragma unroll 1
    for (int k = 0; k < padded; k += 4) {
      float least[P];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const Vec<D> c = book[k + q];
        const float square = form.square(c);
#pragma unroll
        for (int j = 0; j < P; ++j) least[j] = q == 0 ? score<D>(pull[j], c, square) : fminf(least[j], score<D>(pull[j], c, square));
      }
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const bool less = least[j] < best[j];
        best[j] = less ? least[j] : best[j];
        at[j] = less ? k : at[j];
      }
    }
    std::uint64_t groups_of_four = 0;
#pragma unroll
    for (int j = 0; j < P; ++j) groups_of_four |= static_cast<std::uint64_t>(at[j]) << 8 * j;
    unsigned moving = 0;                            // points of the unit whose index changed, and what it was
    std::uint64_t was = 0;
#pragma unroll(D == 2 ? 2 : 1)
    for (int j = 0; j < P; ++j) {
      const int n = first + j * a.metrics;
      if (!group.exists(n)) continue;
      const Vec<D> y = form.pull(group.x[n]);
      const int from = static_cast<int>(groups_of_four >> 8 * j & 255);
      float least = INFINITY;
      int code = from;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const Vec<D> c = book[from + q];
        const float value = score<D>(y, c, form.square(c));
        if (value < least) code = from + q;
        least = fminf(value, least);
      }
      code = code < a.k ? code : a.k - 1;
      const int before = all ? -1 : s.index[n];
      if (code == before) continue;
      s.index[n] = static_cast<std::uint8_t>(code);
      moving |= 1u << j;
      was |= static_cast<std::uint64_t>(before & 255) << 8 * j;
    }
    moved += __popc(moving);
#pragma unroll 1
    for (; moving != 0; moving &= moving - 1) {     // few but for the first iteration: one copy of the code for all
      const int j = __ffs(static_cast<int>(moving)) - 1, n = first + j * a.metrics;
      move_point<D>(s, a, form, form.pull(group.x[n]), group.weight[n], s.index[n], all ? -1 : static_cast<int>(was >> 8 * j & 255),
                    moment, mass);
    }
  });
  if (moved > 0) atomicAdd(changed, moved);
}

// Centroid c of the next iteration from its sums, or where it is if no weight is there, which is counted.
template <int D>
__device__ __forceinline__ void m_step(const EmShared<D>& s, const EmArgs& a, int c, const Vec<D>* book, Vec<D>* next, int* empty,
                                       int exponent) {
  double A[D][D + 1];
  const auto sum = [&](int f) {
    const int at = (f * a.k + c) * a.replicas;
    return static_cast<double>(static_cast<long long>(static_cast<std::uint64_t>(s.high[at]) << 32 | s.low[at]));
  };
  double trace = 0;
  int f = D;
#pragma unroll
  for (int p = 0; p < D; ++p) {
    A[p][D] = sum(p);
#pragma unroll
    for (int q = p; q < D; ++q, ++f) A[p][q] = A[q][p] = sum(f);
    trace += A[p][p];
  }
  Vec<D> out = book[c];
  s.empty[c] = trace <= 0;
  if (trace <= 0) {
    atomicAdd(empty, 1);
  } else {
#pragma unroll
    for (int p = 0; p < D; ++p) {                   // Gauss-Jordan; the matrix is positive definite
      const double pivot = 1 / A[p][p];
#pragma unroll
      for (int q = p; q <= D; ++q) A[p][q] *= pivot;
#pragma unroll
      for (int r = 0; r < D; ++r)
#pragma unroll
        for (int q = D; q >= p; --q)
          if (r != p) A[r][q] -= A[r][p] * A[p][q];
    }
#pragma unroll
    for (int p = 0; p < D; ++p) out.v[p] = static_cast<float>(ldexp(A[p][D], exponent));
  }
  next[c] = out;
}

// Moves every centroid without points to the point farthest from its own, the first of equals; none goes to a point twice.
template <int D, int P>
__device__ __forceinline__ void reseed(const EmShared<D>& s, const EmArgs& a, const Group<D, P>& group, const Vec<D>* book, Vec<D>* next) {
  std::uint64_t last = ~std::uint64_t{0};
  for (int c = 0; c < a.k; ++c) {
    if (!s.empty[c]) continue;
    std::uint64_t farthest = 0;
    group.each_point([&](const Form<D>& form, int n) {
      const float distance = group.distance(form, n, book[s.index[n]]);
      const std::uint64_t key = static_cast<std::uint64_t>(__float_as_uint(distance)) << 32 | ~static_cast<unsigned>(n);
      if (distance > 0.f && key < last && key > farthest) farthest = key;
    });
    last = block_max(farthest, s.reduce);
    if (last == 0) break;
    if (threadIdx.x == 0) next[c] = group.x[~static_cast<unsigned>(last)];
  }
  __syncthreads();
}

template <int D, int P>
__global__ void __launch_bounds__(kEmThreads, 1) em_kernel(const EmArgs a) {
  GPTVQ_DYN_SMEM(unsigned char, memory);
  const EmShared<D> s(memory, a);
  const int g = static_cast<int>(blockIdx.x) / a.starts, start = static_cast<int>(blockIdx.x) % a.starts;
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), padded = EmShared<D>::padded(a.k);
  const Group<D, P> group(a, g);
  Vec<D>* centroids = reinterpret_cast<Vec<D>*>(a.centroids) + (static_cast<std::int64_t>(start) * a.groups + g) * a.k;

  for (int c = tid; c < padded; c += threads) s.book[c] = centroids[c < a.k ? c : a.k - 1];
  for (int f = tid; f < 2 * kSums<D> * a.k * a.replicas; f += threads) s.low[f] = 0;
  if (tid < 4) s.count[tid] = 0;
  float most_moment = 0.f, most_mass = 0.f;         // of the entries of weight M x and of weight M
  group.each_point([&](const Form<D>& form, int n) {
    const Vec<D> pull = form.pull(group.x[n]);
#pragma unroll
    for (int b = 0; b < D; ++b) most_moment = fmaxf(most_moment, 0.5f * group.weight[n] * fabsf(pull.v[b]));
#pragma unroll
    for (int f = 0; f < Form<D>::size; ++f) most_mass = fmaxf(most_mass, group.weight[n] * fabsf(form.m[f]));
  });
  const int bits = 30 + __clz(a.points);            // points times the largest value stay below 2^62
  const Scale moment(block_max(most_moment, s.reduce), bits), mass(block_max(most_mass, s.reduce), bits);

  for (int i = 0;; ++i) {
    const Vec<D>* book = s.book + (i & 1) * padded;
    Vec<D>* next = s.book + (~i & 1) * padded;
    __syncthreads();
    e_step<D, P>(s, a, group, book, i == 0, &s.count[i & 1], moment, mass);
    __syncthreads();
    const bool last = i + 1 == a.iterations, settled = i > 0 && s.count[i & 1] == 0;
    if ((last || settled) && a.loss) {
      double loss = 0;
      group.each_point([&](const Form<D>& form, int n) { loss += group.distance(form, n, book[s.index[n]]); });
      loss = block_sum(loss, s.reduce);
      if (tid == 0) a.loss[static_cast<std::int64_t>(start) * a.groups + g] = loss;
    }
    if (settled) {
      for (int c = tid; c < a.k; c += threads) centroids[c] = book[c];
      return;
    }
    if (tid == 0) s.count[~i & 1] = s.count[2 + (~i & 1)] = 0;
    if (a.replicas > 1) {                           // all replicas into the first
      for (int pair = tid; pair < kSums<D> * a.k; pair += threads) {
        std::uint64_t total = 0;
        for (int r = 0; r < a.replicas; ++r) {      // each thread from another one on: another bank
          const int at = pair * a.replicas + ((r + tid) & (a.replicas - 1));
          total += static_cast<std::uint64_t>(s.high[at]) << 32 | s.low[at];
          s.low[at] = s.high[at] = 0;
        }
        s.low[pair * a.replicas] = static_cast<unsigned>(total);
        s.high[pair * a.replicas] = static_cast<unsigned>(total >> 32);
      }
      __syncthreads();
    }
    for (int c = tid; c < a.k; c += threads) m_step<D>(s, a, c, book, next, &s.count[2 + (i & 1)], mass.exponent - moment.exponent);
    __syncthreads();
    if (s.count[2 + (i & 1)] > 0) reseed<D, P>(s, a, group, book, next);
    if (last) {
      for (int c = tid; c < a.k; c += threads) centroids[c] = next[c];
      return;
    }
    if (a.k + tid < padded) next[a.k + tid] = next[a.k - 1];
  }
}

}  // namespace gptvq
