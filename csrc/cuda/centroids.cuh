// decode: one thread per vector.  collect: one CTA per codebook; every warp adds up its own points, 32 at a time.
//
// Lanes that hit one centroid take turns, by their rank among them:      codes of lanes   3 1 3 2 3
//   so a round never has two lanes at one address, and what a            rank             0 0 1 0 2
//   centroid receives comes in a fixed order, without atomics.
// At the end the warps' sums are added in their order.
#pragma once
#include "cuda/vector.cuh"

namespace gptvq {

constexpr int kDecodeThreads = 256;

struct CodesView {
  const void* index;              // uint8, or uint16 with signs
  int rows, n, groups, strips, k, group_rows;
};

// The code of vector `at`: number of its centroid, and what to negate of its weights.
template <bool kSigned>
struct CodeAt {
  int number;
  unsigned signs;

  __device__ __forceinline__ CodeAt(const CodesView& c, long long at) : signs(0) {
    if constexpr (kSigned) {
      const unsigned code = static_cast<const std::uint16_t*>(c.index)[at];
      number = static_cast<int>(code & 255), signs = code >> 8;
    } else {
      number = static_cast<const std::uint8_t*>(c.index)[at];
    }
    number = min(number, c.k - 1);
  }
};

template <int D> struct VectorOf;
template <> struct VectorOf<1> { using Type = float; };
template <> struct VectorOf<2> { using Type = float2; };
template <> struct VectorOf<4> { using Type = float4; };

__device__ __forceinline__ float times(float v, float s) { return __fmul_rn(v, s); }
__device__ __forceinline__ float2 times(float2 v, float s) { return make_float2(__fmul_rn(v.x, s), __fmul_rn(v.y, s)); }
__device__ __forceinline__ float4 times(float4 v, float s) {
  return make_float4(__fmul_rn(v.x, s), __fmul_rn(v.y, s), __fmul_rn(v.z, s), __fmul_rn(v.w, s));
}

template <int D, bool kSigned>
__global__ void __launch_bounds__(kDecodeThreads) decode_kernel(CodesView c, const float* __restrict__ centroids,
    const std::int64_t* __restrict__ strip, const float* __restrict__ scale, float* __restrict__ Q) {
  using Vector = typename VectorOf<D>::Type;
  const long long i = static_cast<long long>(blockIdx.x) * kDecodeThreads + threadIdx.x;
  if (i >= static_cast<long long>(c.rows) * c.n) return;
  const int row = static_cast<int>(i / c.n), j = static_cast<int>(i % c.n);
  const CodeAt<kSigned> code(c, i);
  const int group = min(row / c.group_rows, c.groups - 1);
  const long long s = max(0LL, min(static_cast<long long>(strip[j]), static_cast<long long>(c.strips) - 1));
  Vector v = reinterpret_cast<const Vector*>(centroids)[(static_cast<long long>(group) * c.strips + s) * c.k + code.number];
  if constexpr (kSigned)
    v = make_float4(negated_if(code.signs, v.x), negated_if(code.signs >> 1, v.y), negated_if(code.signs >> 2, v.z),
                    negated_if(code.signs >> 3, v.w));
  reinterpret_cast<Vector*>(Q)[i] = scale ? times(v, scale[i]) : v;
}

// F values per vector, known to the compiler where F > 0.  kSigned: 4 values that change sign as the weights do, or 16 as their products.
template <int F, bool kSigned>
__global__ void collect_kernel(CodesView c, int f, const float* __restrict__ values, const std::int64_t* __restrict__ order,
                               const std::int64_t* __restrict__ bounds, double* __restrict__ sums) {
  GPTVQ_DYN_SMEM(double, shared);
  const int width = F > 0 ? F : f, book = c.k * width, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.x / c.strips, strip = blockIdx.x % c.strips;
  for (int i = threadIdx.x; i < warps * book; i += blockDim.x) shared[i] = 0;
  __syncthreads();

  double* mine = shared + threadIdx.x / 32 * book;
  const long long first = max(0LL, min(static_cast<long long>(bounds[strip]), static_cast<long long>(c.n)));
  const long long count = max(0LL, min(static_cast<long long>(bounds[strip + 1]), static_cast<long long>(c.n)) - first);
  const long long row0 = static_cast<long long>(group) * c.group_rows;
  const long long points = (min(row0 + c.group_rows, static_cast<long long>(c.rows)) - row0) * count;
  for (long long from = threadIdx.x / 32 * 32; from < points; from += blockDim.x) {
    const bool live = from + lane < points;
    int code = -1;
    unsigned signs = 0;
    long long at = 0;
    if (live) {
      const long long p = from + lane, column = order[first + p % count];
      at = (row0 + p / count) * c.n + max(0LL, min(column, static_cast<long long>(c.n) - 1));
      const CodeAt<kSigned> found(c, at);
      code = found.number, signs = found.signs;
    }
    const std::uint32_t same = __match_any_sync(0xffffffffu, code);
    const int rank = live ? __popc(same & ((1u << lane) - 1)) : 0;
    const int rounds = __reduce_max_sync(0xffffffffu, rank) + 1;
    for (int round = 0; round < rounds; ++round) {
      if (live && rank == round) {
#pragma unroll
        for (int a = 0; a < width; ++a) {
          float value = values[at * width + a];
          if constexpr (kSigned) value = negated_if(F == 4 ? signs >> a : signs >> a / 4 ^ signs >> a % 4, value);
          mine[code * width + a] += static_cast<double>(value);
        }
      }
      __syncwarp();
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < book; i += blockDim.x) {
    double total = shared[i];
    for (int w = 1; w < warps; ++w) total += shared[w * book + i];
    sums[static_cast<long long>(blockIdx.x) * book + i] = total;
  }
}

}  // namespace gptvq
