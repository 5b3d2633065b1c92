// y = W x for 2 to 64 tokens: each chunk is decoded once into fragments, which all tokens then use, 8 at a time.
//
// The 8 output columns of an mma are 4 tokens, column 2 k + p plane p (high, low) of token k; lane 4 g + t scales and adds rows 2 g and
// 2 g + 1 of token t.  Where a step's columns lie in two scale blocks (3 bits a weight, blocks of 64), it is done twice, for either half
// of the lanes' columns.  Sums of a lane are kept in shared memory, where no other lane touches them, until all chunks are done.
#pragma once
#include "cuda/linear_token.cuh"

namespace gptvq {

constexpr int kTokenTile = 8;

template <class F, int Grain>
struct TokensShape {
  static constexpr int tiles = Grain == 256 && F::unit != 8 && F::lookup != Lookup::cta_table ? 2 : 1;      // of 16 rows, a reading of x
  static constexpr int halves = Grain == 64 && F::unit == 32 ? 2 : 1;
  static constexpr int pairs = Grain == 256 ? 4 : F::unit == 32 ? 2 : 1;                    // of steps, between two scalings
  static constexpr int slots = 2 * tiles * 2;       // sums of a lane in a token tile: [4 tokens][tile][row]
};

template <class F>
struct Fragments {
  std::uint32_t a[F::rounds][F::steps][4];

  __device__ __forceinline__ void decode(const Codes<F>& codes, const Table<F>& table) {
#pragma unroll
    for (int i = 0; i < F::rounds; ++i) decode_round(codes, table, i, a[i]);
  }
  __device__ __forceinline__ const std::uint32_t (&step(int s) const)[4] { return a[s / F::steps][s % F::steps]; }
};

// Scales of a lane's two rows: the group's, times those of the chunk's scale blocks.
template <class F, int Grain>
struct RowScales {
  float by[kChunk / Grain][2];

  __device__ __forceinline__ void load(const LinearBatch& batch, const LinearLayer& w, const Place& at, const LaneRows<F>& rows) {
    const float group[2] = {rows.group_scale(batch, w, at, 0), rows.group_scale(batch, w, at, 1)};
#pragma unroll
    for (int k = 0; k < kChunk / Grain; ++k) {
      float scale[2] = {1, 1};
      if constexpr (Grain != 256) rows.block_scales(w, at, Grain * k, scale);
      by[k][0] = group[0] * scale[0], by[k][1] = group[1] * scale[1];
    }
  }
};

// Adds the chunk's products with all tokens to the lane's sums, [token tile][slot][lane].
template <class F, int Grain, int Tiles>
__device__ __forceinline__ void add_tokens(const LinearBatch& batch, const LinearLayer& w, const Place& at,
                                           const Fragments<F> (&fragments)[Tiles], const RowScales<F, Grain> (&scales)[Tiles], int g, int t,
                                           float* sums) {
  using Shape = TokensShape<F, Grain>;
  constexpr int spans = kChunk / Grain;
  std::uint32_t half[2] = {opaque(t / 2 == 0), opaque(t / 2 == 1)};
#pragma unroll 1
  for (int first = 0; first < batch.tokens; first += kTokenTile, sums += 32 * Shape::slots) {
#pragma unroll 1
    for (int n = 0; n < 2; ++n) {
      const int x_token = min(first + 4 * n + g / 2, batch.tokens - 1), my_token = min(first + 4 * n + t, batch.tokens - 1);
      const std::int8_t* x = batch.x + (static_cast<std::int64_t>(x_token) * w.chunks + at.chunk) * 2 * kChunk + g % 2 * kChunk + 16 * t;
      const float* step = batch.step + (static_cast<std::int64_t>(my_token) * w.chunks + at.chunk) * spans;
      float sum[Tiles][2];
#pragma unroll
      for (int p = 0; p < Tiles; ++p) sum[p][0] = sum[p][1] = 0;
#pragma unroll
      for (int q = 0; q < kSteps / 2; q += Shape::pairs) {
        std::int32_t c[Shape::halves][Tiles][4] = {};
#pragma unroll
        for (int k = q; k < q + Shape::pairs; ++k) {
          const uint4 v = __ldg(reinterpret_cast<const uint4*>(x + 64 * k));
#pragma unroll
          for (int h = 0; h < Shape::halves; ++h) {
            std::uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
            if constexpr (Shape::halves == 2) b[0][0] *= half[h], b[0][1] *= half[h], b[1][0] *= half[h], b[1][1] *= half[h];
#pragma unroll
            for (int p = 0; p < Tiles; ++p) {
              mma_m16n8k32_s8(c[h][p], fragments[p].step(2 * k), b[0]);
              mma_m16n8k32_s8(c[h][p], fragments[p].step(2 * k + 1), b[1]);
            }
          }
        }
#pragma unroll
        for (int h = 0; h < Shape::halves; ++h) {
          const int span = Grain == 256 ? 0 : q + h;
          const float by = __ldg(step + span);
#pragma unroll
          for (int p = 0; p < Tiles; ++p)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const float found = static_cast<float>(c[h][p][2 * r] * batch.high_weight + c[h][p][2 * r + 1]);
              sum[p][r] = fmaf(found, by * scales[p].by[span][r], sum[p][r]);
            }
        }
      }
#pragma unroll
      for (int p = 0; p < Tiles; ++p)
#pragma unroll
        for (int r = 0; r < 2; ++r) sums[32 * ((n * Tiles + p) * 2 + r)] += sum[p][r];
    }
  }
}

// One CTA per `tiles` tiles of 16 rows, whose warps take turns at the chunks.
template <class F, int Grain>
__global__ void __launch_bounds__(32 * kTokensWarps, 2) linear_tile_tokens_kernel(const __grid_constant__ LinearBatch batch) {
  using Shape = TokensShape<F, Grain>;
  constexpr int tiles = Shape::tiles;
  GPTVQ_DYN_SMEM(float, sums);                  // [warp][token tile][slot][lane]
  GPTVQ_SHARED(PairTable, tables, (pair_tables<F, kTokensWarps>));
  const int warp = uniform(threadIdx.x / 32), l = lane_id(), g = l / 4, t = l % 4;
  const LinearLayer& w = batch.layer[batch.layer_of(blockIdx.x)];
  const int tile = (blockIdx.x - w.first_cta) * tiles, token_tiles = (batch.tokens + kTokenTile - 1) / kTokenTile;
  const int warp_sums = token_tiles * Shape::slots * 32;
  for (int i = 0; i < token_tiles * Shape::slots; ++i) sums[warp * warp_sums + 32 * i + l] = 0;

  int turn = 2 * warp;
#pragma unroll 1
  for (Place at(w, warp < w.warps ? warp : w.chunks); at.chunk < w.chunks; at.advance(w)) {
    Fragments<F> fragments[tiles];
    RowScales<F, Grain> scales[tiles];
#pragma unroll
    for (int p = 0; p < tiles; ++p) {
      const LaneRows<F> rows(w, min(tile + p, w.tiles - 1), g, t);
      const Codes<F> codes = rows.codes(batch, w, at, t);
      scales[p].load(batch, w, at, rows);
      Table<F> table(batch.two_to_16);
      find_books<F>(batch, w, at, rows, tables, turn, table);
      fragments[p].decode(codes, table);
    }
    add_tokens<F, Grain, tiles>(batch, w, at, fragments, scales, g, t, sums + warp * warp_sums + l);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < batch.tokens * 16 * tiles; i += blockDim.x) {
    const int in_tiles = i % (16 * tiles), token = i / (16 * tiles), row = 16 * tile + in_tiles;
    if (row >= w.rows) continue;
    const int slot = (token % kTokenTile / 4 * tiles + in_tiles / 16) * 2 + in_tiles % 2;
    const float* from = sums + (token / kTokenTile * Shape::slots + slot) * 32 + in_tiles % 16 / 2 * 4 + token % 4;
    put_output(batch, w, token, row, over_warps(from, warp_sums, w));
  }
}

// See linear_group_kernel.
template <class F, int Grain>
__global__ void __launch_bounds__(32 * kTokensWarps, 2) linear_group_tokens_kernel(const __grid_constant__ LinearBatch batch) {
  using Shape = TokensShape<F, Grain>;
  GPTVQ_DYN_SMEM(float, sums);
  GPTVQ_SHARED(uint4, entries, 256 * 8);
  const int warp = uniform(threadIdx.x / 32), l = lane_id(), g = l / 4, t = l % 4;
  const LinearLayer& w = batch.layer[batch.layer_of(blockIdx.x)];
  const GroupPart part(w, blockIdx.x - w.first_cta, warp);
  const LaneRows<F> rows(w, part.tile, g, t);
  const int token_tiles = (batch.tokens + kTokenTile - 1) / kTokenTile;
  float* mine = sums + warp * token_tiles * Shape::slots * 32 + l;
  for (int i = 0; i < token_tiles * Shape::slots; ++i) mine[32 * i] = 0;

  const Table<F> table(entries, l);
  walk_group<F>(batch, w, part, rows, entries, t, [&](const Place& at, const Codes<F>& codes) {
    Fragments<F> fragments[1];
    RowScales<F, Grain> scales[1];
    scales[0].load(batch, w, at, rows);
    fragments[0].decode(codes, table);
    add_tokens<F, Grain, 1>(batch, w, at, fragments, scales, g, t, mine);
  });
  if (!part.works) return;
  for (int i = 0; i < token_tiles * Shape::slots; ++i) {
    const int token = i / Shape::slots * kTokenTile + i % Shape::slots / 2 * 4 + t, row = 16 * part.tile + 2 * g + i % 2;
    if (token < batch.tokens && row < w.rows) put_sum(batch, w, part.split, token, row, mine[32 * i]);
  }
}

}  // namespace gptvq
