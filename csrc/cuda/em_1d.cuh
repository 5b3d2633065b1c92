// EM of 1D codebooks: sorted once, the points of a centroid are a range, and their sums differences of prefix sums.
//
//   thread block = a group: all its threads sort the points and add up; then every warp takes starts, a lane a centroid,
//   through all iterations of a round, and the best starts go on to the next one.  All in float64, every sum in a fixed order.
#pragma once
#include <cfloat>

#include "cuda/platform.cuh"

namespace gptvq {

constexpr int kRounds = 8;
constexpr int kMostWarps = 8;

struct Em1dArgs {
  int groups, points, metrics, k, starts, rounds;
  int size;                                         // keys: points rounded up to a power of two, or 0 where x is sorted
  int iterations[kRounds], keep[kRounds];
  const float *x, *metric, *weight;                 // sorted: weight is the whole one, points without weight come last
  const float* seeds;                               // [starts, groups, k]
  float* centroids;                                 // [groups, k]
  double* sums;                                     // [groups, 2, points + 1], or null: in shared memory
};

// Sorts as the float does; points without weight as +infinity.
__device__ __forceinline__ unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The points of a group that have weight, in ascending order, and what is before each: mass = sum of weight, moment = sum of weight x.
template <bool kSorted>
struct Points1d {
  std::uint64_t* keys;
  const float *x, *weight, *metric;
  int points, metrics;
  double *mass, *moment;

  __device__ __forceinline__ float value(int i) const { return kSorted ? x[i] : unordered(static_cast<unsigned>(keys[i] >> 32)); }
  __device__ __forceinline__ float whole(int n) const { return kSorted ? weight[n] : metric[n % metrics] * weight[n]; }
  __device__ __forceinline__ double mass_of(int i) const {
    return static_cast<double>(whole(kSorted ? i : static_cast<int>(static_cast<unsigned>(keys[i]))));
  }
  // Points that are not above `limit`: of equal distances the lower centroid wins.
  __device__ __forceinline__ int below(double limit) const {
    int low = 0, high = points;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (static_cast<double>(value(middle)) <= limit) low = middle + 1;
      else high = middle;
    }
    return low;
  }
};

// What a warp knows of its start.
struct Climb {
  double *now, *next;         // [k] ascending
  int* cut;                   // [k - 1]: points before that belong to lower centroids

  __device__ __forceinline__ int begin(int c) const { return c > 0 ? cut[c - 1] : 0; }
  __device__ __forceinline__ int end(int c, int k, int points) const { return c + 1 < k ? cut[c] : points; }
};

// f(i, weight, squared distance to its centroid) for the points of a lane.
template <bool kSorted, class F>
__device__ __forceinline__ void each_distance(const Points1d<kSorted>& p, const Climb& climb, int k, F&& f) {
  int member = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < p.points; i += 32) {
    while (member + 1 < k && climb.cut[member] <= i) ++member;
    const double delta = static_cast<double>(p.value(i)) - climb.now[member];
    f(i, p.mass_of(i) * delta * delta);
  }
}

// Centroids without points move to the points farthest from their own, the first of equals.
template <bool kSorted>
__device__ __forceinline__ void reseed_1d(const Points1d<kSorted>& p, const Climb& climb, int k) {
  double last = INFINITY;
  int last_at = -1;
  for (int c = 0; c < k; ++c) {
    if (p.mass[climb.end(c, k, p.points)] - p.mass[climb.begin(c)] > 0) continue;
    double farthest = 0;
    int at = p.points;
    each_distance(p, climb, k, [&](int i, double distance) {
      if ((distance < last || (distance == last && i > last_at)) && distance > farthest) {
        farthest = distance;
        at = i;
      }
    });
    for (int o = 16; o > 0; o /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, farthest, o);
      const int other_at = __shfl_xor_sync(0xffffffffu, at, o);
      if (other > farthest || (other == farthest && other_at < at)) {
        farthest = other;
        at = other_at;
      }
    }
    if (!(farthest > 0)) break;
    if (threadIdx.x % 32 == 0) climb.next[c] = p.value(at);
    last = farthest;
    last_at = at;
  }
  __syncwarp();
}

// now = next in ascending order.
__device__ __forceinline__ void sort_centroids(const Climb& climb, int k) {
  for (int c = static_cast<int>(threadIdx.x) % 32; c < k; c += 32) {
    const double value = climb.next[c];
    int rank = 0;
    for (int j = 0; j < k; ++j) rank += climb.next[j] < value || (climb.next[j] == value && j < c);
    climb.now[rank] = value;
  }
  __syncwarp();
}

// Moves the centroids in climb.next by up to `iterations` steps -> climb.now; returns the loss of the last assignment.
template <bool kSorted>
__device__ __forceinline__ double climb_1d(const Points1d<kSorted>& p, const Climb& climb, int k, int iterations) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double loss = 0;
  sort_centroids(climb, k);
  for (int i = 0; i < iterations; ++i) {
    bool moved = i == 0;
    for (int c = lane; c + 1 < k; c += 32) {
      const int cut = p.below((climb.now[c] + climb.now[c + 1]) / 2);
      moved |= i == 0 || cut != climb.cut[c];
      climb.cut[c] = cut;
    }
    moved = __any_sync(0xffffffffu, moved);
    __syncwarp();
    if (i + 1 == iterations || !moved) {
      each_distance(p, climb, k, [&](int, double distance) { loss += distance; });
      for (int o = 16; o > 0; o /= 2) loss += __shfl_xor_sync(0xffffffffu, loss, o);
    }
    if (!moved) break;
    bool empty = false;
    for (int c = lane; c < k; c += 32) {
      const int from = climb.begin(c), to = climb.end(c, k, p.points);
      const double total = p.mass[to] - p.mass[from];
      climb.next[c] = total > 0 ? (p.moment[to] - p.moment[from]) / total : climb.now[c];
      empty |= !(total > 0);
    }
    __syncwarp();
    if (__any_sync(0xffffffffu, empty)) reseed_1d(p, climb, k);
    sort_centroids(climb, k);
  }
  return loss;
}

// Ascending, in place, a power of two of keys; all threads of the block.
__device__ __forceinline__ void bitonic_sort(std::uint64_t* keys, int size) {
  for (int run = 2; run <= size; run *= 2)
    for (int apart = run / 2; apart > 0; apart /= 2) {
      __syncthreads();
      for (int t = static_cast<int>(threadIdx.x); t < size / 2; t += static_cast<int>(blockDim.x)) {
        const int low = t / apart * 2 * apart + t % apart, high = low + apart;
        const std::uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  __syncthreads();
}

// mass and moment of all prefixes: a thread adds up consecutive points, a warp its threads' sums, the block its warps'.
template <bool kSorted>
__device__ __forceinline__ void prefix_sums(const Points1d<kSorted>& p, double* totals) {
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = tid % 32, warp = tid / 32;
  const int each = (p.points + threads - 1) / threads, from = tid * each < p.points ? tid * each : p.points;
  const int to = from + each < p.points ? from + each : p.points;
  double before[2] = {0, 0};
  for (int i = from; i < to; ++i) {
    const double weight = p.mass_of(i);
    before[0] += weight;
    before[1] += weight * p.value(i);
  }
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    double sum = before[v];
    for (int o = 1; o < 32; o *= 2) {
      const double other = __shfl_up_sync(0xffffffffu, sum, o);
      if (lane >= o) sum += other;
    }
    if (lane == 31) totals[2 * warp + v] = sum;
    const double lower = __shfl_up_sync(0xffffffffu, sum, 1);
    before[v] = lane > 0 ? lower : 0;
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    double earlier = 0;
    for (int w = 0; w < warp; ++w) earlier += totals[2 * w + v];
    before[v] += earlier;
  }
  for (int i = from; i < to; ++i) {
    p.mass[i] = before[0];
    p.moment[i] = before[1];
    const double weight = p.mass_of(i);
    before[0] += weight;
    before[1] += weight * p.value(i);
  }
  if (tid == threads - 1) {                         // its range ends with the last point, or is empty
    p.mass[p.points] = before[0];
    p.moment[p.points] = before[1];
  }
  __syncthreads();
}

// Shared memory of a thread block, in this order.
struct Em1dShared {
  double *loss, *totals;      // [starts], [warps, 2]
  double *centroids;          // [warps, 2, k]
  double* sums;               // [2, points + 1], unless in global memory
  std::uint64_t* keys;        // [size]
  float* tried;               // [starts, k]
  int *cut, *order;           // [warps, k], [starts]: the starts that are left, best first

  __host__ __device__ static std::int64_t bytes(const Em1dArgs& a, int warps) {
    const std::int64_t starts = a.starts, k = a.k, sorted = a.size > 0 ? 2 * (std::int64_t{a.points} + 1) + a.size : 0;
    return 8 * (starts + 2 * warps + 2 * warps * k + sorted) + 4 * (starts * k + warps * k + starts);
  }
  __device__ Em1dShared(unsigned char* from, const Em1dArgs& a, int warps) {
    loss = reinterpret_cast<double*>(from);
    totals = loss + a.starts;
    centroids = totals + 2 * warps;
    sums = centroids + 2 * warps * a.k;
    keys = reinterpret_cast<std::uint64_t*>(sums + (a.size > 0 ? 2 * (a.points + 1) : 0));
    tried = reinterpret_cast<float*>(keys + a.size);
    cut = reinterpret_cast<int*>(tried + a.starts * a.k);
    order = cut + warps * a.k;
  }
};

template <bool kSorted>
__global__ void __launch_bounds__(kMostWarps * 32, 2) em_1d_kernel(const Em1dArgs a) {
  GPTVQ_DYN_SMEM(unsigned char, memory);
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const Em1dShared s(memory, a, warps);
  const std::int64_t g = blockIdx.x;
  double* sums = kSorted ? a.sums + g * 2 * (a.points + std::int64_t{1}) : s.sums;
  Points1d<kSorted> points{s.keys, a.x + g * a.points, a.weight + g * a.points, a.metric, a.points, a.metrics,
                                 sums, sums + a.points + 1};
  const Climb climb{s.centroids + warp * 2 * a.k, s.centroids + (warp * 2 + 1) * a.k, s.cut + warp * a.k};

  if (!kSorted) {
    for (int n = tid; n < a.size; n += threads) {
      const bool counts = n < a.points && points.whole(n) > 0.f;
      s.keys[n] = static_cast<std::uint64_t>(counts ? ordered(points.x[n]) : ordered(INFINITY)) << 32 | static_cast<unsigned>(n);
    }
    bitonic_sort(s.keys, a.size);
  }
  points.points = points.below(FLT_MAX);
  prefix_sums(points, s.totals);
  for (int t = tid; t < a.starts * a.k; t += threads)
    s.tried[t] = a.seeds[(t / a.k * static_cast<std::int64_t>(a.groups) + g) * a.k + t % a.k];
  for (int t = tid; t < a.starts; t += threads) s.order[t] = t;
  int left = a.starts;
  for (int round = 0; round < a.rounds; ++round) {
    __syncthreads();
    for (int t = warp; t < left; t += warps) {
      float* tried = s.tried + s.order[t] * a.k;
      for (int c = lane; c < a.k; c += 32) climb.next[c] = tried[c];
      __syncwarp();
      const double loss = climb_1d(points, climb, a.k, a.iterations[round]);
      for (int c = lane; c < a.k; c += 32) tried[c] = static_cast<float>(climb.now[c]);
      if (lane == 0) s.loss[s.order[t]] = loss;
      __syncwarp();
    }
    __syncthreads();
    if (tid == 0)                                   // stable insertion sort by loss
      for (int t = 1; t < left; ++t) {
        const int mine = s.order[t];
        int to = t;
        for (; to > 0 && s.loss[mine] < s.loss[s.order[to - 1]]; --to) s.order[to] = s.order[to - 1];
        s.order[to] = mine;
      }
    left = left < a.keep[round] ? left : a.keep[round];
  }
  __syncthreads();
  for (int c = tid; c < a.k; c += threads) a.centroids[g * a.k + c] = s.tried[s.order[0] * a.k + c];
}

}  // namespace gptvq
