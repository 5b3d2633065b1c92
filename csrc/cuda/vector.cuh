// What the kernels of quantization share: vectors of d weights and the d x d forms on them.  And how a weight changes its sign.
#pragma once
#include "cuda/platform.cuh"

namespace gptvq {

// `v`, or -v where the lowest bit of `flip` is set.
__device__ __forceinline__ float negated_if(std::uint32_t flip, float v) { return __uint_as_float(__float_as_uint(v) ^ flip << 31); }

// D floats, loaded and stored in one piece.
template <int D>
struct alignas(4 * D) Vec {
  float v[D];
};

// The upper triangle of a symmetric [D, D] matrix row by row, entries off the diagonal doubled.
template <int D>
struct Form {
  static constexpr int size = D * (D + 1) / 2;
  float m[size];

  __device__ __forceinline__ void load(const float* M) {
    int f = 0;
#pragma unroll
    for (int a = 0; a < D; ++a)
#pragma unroll
      for (int b = a; b < D; ++b, ++f) m[f] = a == b ? M[a * D + b] : 2.f * M[a * D + b];
  }

  // c^T M c.  Explicit fused steps: whoever computes it again gets the same bits.
  __device__ __forceinline__ float square(const Vec<D>& c) const {
    float sum = 0.f;
    int f = 0;
#pragma unroll
    for (int a = 0; a < D; ++a) {
      float row = m[f++] * c.v[a];
#pragma unroll
      for (int b = a + 1; b < D; ++b) row = fmaf(m[f++], c.v[b], row);
      sum = a == 0 ? row * c.v[0] : fmaf(row, c.v[a], sum);
    }
    return sum;
  }

  // -2 M x: then (x - c)^T M (x - c) = x^T M x + score(that, c, square(c)).
  __device__ __forceinline__ Vec<D> pull(const Vec<D>& x) const {
    Vec<D> out;
#pragma unroll
    for (int a = 0; a < D; ++a) out.v[a] = 0.f;
    int f = 0;
#pragma unroll
    for (int a = 0; a < D; ++a)
#pragma unroll
      for (int b = a; b < D; ++b, ++f) {
        out.v[a] = fmaf(a == b ? -2.f * m[f] : -m[f], x.v[b], out.v[a]);
        if (a != b) out.v[b] = fmaf(-m[f], x.v[a], out.v[b]);
      }
    return out;
  }
};

// `c` with the weights negated whose bit of `signs` is set.
template <int D>
__device__ __forceinline__ Vec<D> with_signs(Vec<D> c, unsigned signs) {
#pragma unroll
  for (int a = 0; a < D; ++a) c.v[a] = negated_if(signs >> a, c.v[a]);
  return c;
}

template <int D>
__device__ __forceinline__ float score(const Vec<D>& pull, const Vec<D>& c, float square) {
#pragma unroll
  for (int a = 0; a < D; ++a) square = fmaf(pull.v[a], c.v[a], square);
  return square;
}

}  // namespace gptvq
