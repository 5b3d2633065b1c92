// y = W x with weights and inputs rounded to float16 and sums in float32: the usual way, kept to compare the integer kernels with.
//
// Codes are found as there (linear_decode.cuh); a word of four weights of a row is one step of mma.m16n8k16, and 8 tokens are its columns.
#pragma once
#include "cuda/linear_token.cuh"

namespace gptvq {

constexpr int kHalfTokens = 8;

// x [tokens, chunks, 256] float16, in the order of LinearFormat::column_at; a warp per token and chunk, 8 columns a lane.
template <class F>
__global__ void __launch_bounds__(32 * kQuantizeWarps) linear_half_inputs_kernel(Inputs in, const __grid_constant__ LinearLayer w) {
  const int l = lane_id(), chunk = blockIdx.x * kQuantizeWarps + threadIdx.x / 32, token = blockIdx.y;
  if (chunk >= w.chunks) return;
  const Place at(w, chunk);
  const int first = at.block(w) * 32, count = min(in.cols - first, at.live_blocks(w) * 32);
  const std::int64_t from = static_cast<std::int64_t>(token) * in.cols + first;
  __half* to = reinterpret_cast<__half*>(in.planes) + (static_cast<std::int64_t>(token) * w.chunks + chunk) * kChunk + 8 * l;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = F::column_at(8 * l + j);
    to[j] = __float2half_rn(column < count ? load_as_float(in.x, in.type, from + column) : 0.f);
  }
}

// Bytes 2 `Half` and 2 `Half` + 1 of four weights, times a scale.
template <int Half>
__device__ __forceinline__ std::uint32_t scaled_pair(std::uint32_t weights, __half2 scale) {
  const std::uint32_t bits = prmt(weights ^ 0x80808080u, 0x64646464u, Half ? 0x4342 : 0x4140);        // 1024 + 128 + weight
  __half2 value;
  memcpy(&value, &bits, 4);
  value = __hmul2(__hsub2(value, __float2half2_rn(1152.f)), scale);
  std::uint32_t r;
  memcpy(&r, &value, 4);
  return r;
}

template <class F>
__device__ __forceinline__ void add_halves(const LinearBatch& batch, const LinearLayer& w, const Place& at, const LaneRows<F>& rows,
                                           const Codes<F>& codes, const Table<F>& table, const __half* x, int t, float (&c)[4]) {
  const float group[2] = {rows.group_scale(batch, w, at, 0), rows.group_scale(batch, w, at, 1)};
#pragma unroll
  for (int i = 0; i < F::rounds; ++i) {
    std::uint32_t found[F::steps][4];
    decode_round(codes, table, i, found);
#pragma unroll
    for (int j = 0; j < F::steps; ++j) {
      const int s = i * F::steps + j;
      float scale[2] = {1, 1};
      if (w.sc) rows.block_scales(w, at, (4 * i + t) * F::unit + (F::unit == 32 ? 8 * j : 0), scale);
      const __half2 by[2] = {__float2half2_rn(group[0] * scale[0]), __float2half2_rn(group[1] * scale[1])};
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(x + s / 2 * 64 + 16 * t + s % 2 * 8));
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const std::uint32_t even = found[j][2 * k], odd = found[j][2 * k + 1];
        const std::uint32_t a[4] = {scaled_pair<0>(even, by[0]), scaled_pair<0>(odd, by[1]), scaled_pair<1>(even, by[0]),
                                    scaled_pair<1>(odd, by[1])};
        const std::uint32_t b[2] = {k ? v.z : v.x, k ? v.w : v.y};
        mma_m16n8k16(c, a, b);
      }
    }
  }
}

// A CTA's tiles and chunks as in linear_tile_kernel or, where the CTA has a table, in linear_group_kernel.
template <class F>
__global__ void __launch_bounds__(32 * kTokensWarps) linear_half_kernel(const __grid_constant__ LinearBatch batch) {
  constexpr bool by_group = F::lookup == Lookup::cta_table;
  GPTVQ_SHARED(uint4, entries, by_group ? 256 * 8 : 1);
  GPTVQ_SHARED(PairTable, tables, (pair_tables<F, kTokensWarps>));
  GPTVQ_SHARED(float, sums, by_group ? 1 : kTokensWarps * 128);
  const int warp = uniform(threadIdx.x / 32), l = lane_id(), g = l / 4, t = l % 4, first = blockIdx.y * kHalfTokens;
  const LinearLayer& w = batch.layer[batch.layer_of(blockIdx.x)];
  const std::int64_t token = min(first + g, batch.tokens - 1);
  const __half* x = reinterpret_cast<const __half*>(batch.x) + token * w.chunks * kChunk;
  float c[4] = {0, 0, 0, 0};
  if constexpr (by_group) {
    const GroupPart part(w, blockIdx.x - w.first_cta, warp);
    const LaneRows<F> rows(w, part.tile, g, t);
    const Table<F> table(entries, l);
    walk_group<F>(batch, w, part, rows, entries, t, [&](const Place& at, const Codes<F>& codes) {
      add_halves<F>(batch, w, at, rows, codes, table, x + at.chunk * kChunk, t, c);
    });
    if (!part.works) return;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int to = first + 2 * t + k % 2, row = 16 * part.tile + 2 * g + k / 2;
      if (to < batch.tokens && row < w.rows) put_sum(batch, w, part.split, to, row, c[k]);
    }
  } else {
    const int tile = blockIdx.x - w.first_cta;
    const LaneRows<F> rows(w, tile, g, t);
    Table<F> table(batch.two_to_16);
    int turn = 2 * warp;
#pragma unroll 1
    for (Place at(w, warp < w.warps ? warp : w.chunks); at.chunk < w.chunks; at.advance(w)) {
      find_books<F>(batch, w, at, rows, tables, turn, table);
      add_halves<F>(batch, w, at, rows, rows.codes(batch, w, at, t), table, x + at.chunk * kChunk, t, c);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[warp * 128 + 32 * k + l] = c[k];
    __syncthreads();
    for (int i = threadIdx.x; i < 128; i += blockDim.x) {
      const int to = first + 2 * (i % 4) + i / 32 % 2, row = 16 * tile + 2 * (i % 32 / 4) + i / 64;
      if (to < batch.tokens && row < w.rows) put_output(batch, w, to, row, over_warps(sums + i, 128, w));
    }
  }
}

}  // namespace gptvq
