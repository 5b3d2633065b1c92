// Before the products: activations to integers.
#pragma once
#include "cuda/linear_args.cuh"

namespace gptvq {

constexpr float kTiny = 1e-30f;     // of a span: less than this counts as zero, lest 1 / step overflow

// A warp per token and chunk.  Lane l reads columns 8 l .. 8 l + 7 to find the spans' peaks, and writes bytes 8 l .. of both planes.
// A span with a NaN or infinity gets the step NaN, so that the outputs are NaN.
template <class F, int Grain>
__global__ void __launch_bounds__(32 * kQuantizeWarps) linear_inputs_kernel(Inputs in, const __grid_constant__ LinearLayer w) {
  const int l = threadIdx.x % 32, chunk = blockIdx.x * kQuantizeWarps + threadIdx.x / 32, token = blockIdx.y;
  if (chunk >= w.chunks) return;
  const Place at(w, chunk);
  const int first = at.block(w) * 32, count = min(in.cols - first, at.live_blocks(w) * 32);
  const std::int64_t from = static_cast<std::int64_t>(token) * in.cols + first, to = static_cast<std::int64_t>(token) * w.chunks + chunk;
  std::uint32_t bits = 0;           // of |x|: NaN > infinity > finite
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (8 * l + j < count) bits = max(bits, __float_as_uint(load_as_float(in.x, in.type, from + 8 * l + j)) & 0x7fffffffu);
  for (int d = 1; 8 * d < in.span; d *= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, d));
  const bool finite = bits < 0x7f800000u;
  const float peak = __uint_as_float(bits), limit = static_cast<float>(in.limit);
  const bool zero = peak < kTiny;
  if (l % (Grain / 8) == 0)
    in.step[to * (kChunk / Grain) + l / (Grain / 8)] = !finite ? __uint_as_float(0x7fc00000u) : zero ? 0.f : __fdiv_rn(peak, limit);
  const float inverse = __shfl_sync(0xffffffffu, finite && !zero ? __fdiv_rn(limit, peak) : 0.f, F::column_at(8 * l) / 8);
  std::uint32_t high[2] = {0, 0}, low[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = F::column_at(8 * l + j);
    if (column >= count || inverse == 0.f) continue;
    const int whole = __float2int_rn(__fmul_rn(load_as_float(in.x, in.type, from + column), inverse));
    const int upper = in.limit == 127 ? whole : __float2int_rn(static_cast<float>(whole) * (1.f / 254));
    high[j / 4] |= (upper & 255u) << j % 4 * 8;
    low[j / 4] |= in.limit == 127 ? 0u : ((whole - 254 * upper) & 255u) << j % 4 * 8;
  }
  uint2* planes = reinterpret_cast<uint2*>(in.planes + to * 2 * kChunk) + l;
  planes[0] = make_uint2(high[0], high[1]);
  planes[kChunk / 8] = make_uint2(low[0], low[1]);
}

}  // namespace gptvq
