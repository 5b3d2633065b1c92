// What linear.cu launches by itself: y = W x in float32 products for any shape, and the sums of several CTAs to outputs.
#pragma once
#include "cuda/layout.cuh"
#include "cuda/linear_args.cuh"

namespace gptvq {

constexpr int kExactWarps = 4, kExactTokens = 4, kSumThreads = 256;

struct ExactArgs {
  const std::uint8_t* idx;
  const std::int8_t* cb;
  const std::uint16_t* gs;
  const std::uint8_t* sc;
  const float *scale_table, *bias;
  const void* x;
  void* y;
  int rows, cols, blocks, strips, group_rows, group_cols, scale_block, scale_pairs, tokens, type;
};

// A warp per row and kExactTokens tokens, a lane per column of a block: weights as gptvq.weight.VQWeight defines them, sums in double.
template <int Bits, int Dim>
__global__ void __launch_bounds__(32 * kExactWarps) linear_exact_kernel(ExactArgs a) {
  using Layout = DeviceLayout<Bits, Dim>;
  const int lane = threadIdx.x % 32, row = blockIdx.x * kExactWarps + threadIdx.x / 32, first = blockIdx.y * kExactTokens;
  if (row >= a.rows) return;
  const int tile = row / 16, vector = lane / Dim;
  const std::int64_t group = static_cast<std::int64_t>(row / a.group_rows) * a.strips;
  double sum[kExactTokens] = {};
  for (int block = 0; block < a.blocks; ++block) {
    const int col = 32 * block + lane;
    if (col >= a.cols) break;
    const std::int64_t at = (static_cast<std::int64_t>(tile) * a.blocks + block) * Layout::block_bytes + row % 16 * 4;
    const auto* words = reinterpret_cast<const std::uint32_t*>(a.idx + at);
    const std::uint32_t code = Layout::quad(words, vector / 4) >> vector % 4 * 8 & (Layout::codewords - 1);
    const std::int64_t book = group + col / a.group_cols;
    float weight = __fmul_rn(static_cast<float>(a.cb[(book * Dim + lane % Dim) * Layout::codewords + code]), bfloat(a.gs[book]));
    if constexpr (Layout::has_signs) weight = negated_if(Layout::signs(words) >> (8 * (lane % Dim) + vector), weight);
    if (a.sc) {
      const int of = col / a.scale_block;
      const int scale = a.sc[(static_cast<std::int64_t>(tile) * a.scale_pairs + of / 2) * 16 + row % 16] >> of % 2 * 4 & 15;
      weight = __fmul_rn(weight, a.scale_table[16 * of + scale]);
    }
#pragma unroll
    for (int k = 0; k < kExactTokens; ++k)
      if (first + k < a.tokens)
        sum[k] += static_cast<double>(weight) * load_as_float(a.x, a.type, static_cast<std::int64_t>(first + k) * a.cols + col);
  }
#pragma unroll
  for (int k = 0; k < kExactTokens; ++k) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], d);
    if (lane == 0 && first + k < a.tokens)
      store_rounded(a.y, a.type, static_cast<std::int64_t>(first + k) * a.rows + row,
                    static_cast<float>(sum[k] + static_cast<double>(a.bias ? a.bias[row] : 0.f)));
  }
}

// One thread per token and row of all layers; those of layers without splits have nothing to do.
__global__ void __launch_bounds__(kSumThreads) linear_sum_kernel(const __grid_constant__ LinearBatch batch) {
  const int at = blockIdx.x * kSumThreads + threadIdx.x, token = blockIdx.y;
  if (at >= batch.total_rows) return;
  int l = 0;
  while (l + 1 < batch.layers && at >= batch.layer[l + 1].first_row) ++l;
  const LinearLayer& w = batch.layer[l];
  if (w.splits == 1) return;
  const int row = at - w.first_row;
  const float* from = w.partial + static_cast<std::int64_t>(token) * w.rows + row;
  float sum = 0;
  for (int s = 0; s < w.splits; ++s) sum += from[s * static_cast<std::int64_t>(batch.tokens) * w.rows];
  put_output(batch, w, token, row, sum);
}

}  // namespace gptvq
