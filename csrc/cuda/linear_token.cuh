// y = W x for one token (or a few, one after the other in blockIdx.y).
//
// Weights and activations meet as integers in mma.m16n8k32 s8, exact in int32 over the 256 columns of a chunk.  Its 8 output columns
// separate the spans of columns that have scales of their own: the fragment of x is block-diagonal, column 2 n + p of it holds plane p
// (high, low) of the activations where the lane's columns belong to span n, and zeros elsewhere.  So
//
//   lane 4 g + t:   c0, c1 = high and low sums of row 2 g over span t      c2, c3 = of row 2 g + 1
//
// and each lane scales and adds what it holds.  Spans of 64 columns (Grain) take one accumulator, those of 16 or 32 four.  Without block
// scales (Grain = 256) all four column pairs hold the same.
#pragma once
#include "cuda/linear_args.cuh"

namespace gptvq {

// Which span the columns of step s belong to on lane t, and how x gets there.
template <class F, int Grain>
struct Spans {
  static constexpr int count = kChunk / Grain, tiles = Grain == 16 ? 4 : 1;
  static __device__ constexpr int tile(int s) { return Grain != 16 ? 0 : F::unit == 32 ? s / 4 * 2 + s % 4 / 2 : s / 2; }
  // The span whose sums lane t finds in accumulator `tile`.
  static __device__ constexpr int span(int tile, int t) {
    return Grain == 256 ? 0 : Grain == 16 && F::unit == 32 ? 8 * (tile / 2) + 2 * t + tile % 2 : 4 * tile + t;
  }

  // Steps are dealt to `kinds` kinds of lanes; to lanes of the other kinds, and to idle lanes for all of them, their x is zero.
  static constexpr int kinds = Grain == 64 ? (F::unit == 32 ? 2 : 4) : Grain == 16 && F::unit == 8 ? 2 : 1, own = kSteps / kinds;
  static __device__ constexpr int kind(int s) { return kinds == 1 ? 0 : Grain == 64 ? s / own : s % 2; }
  static __device__ constexpr int turn(int s) { return kinds == 1 ? s : Grain == 64 ? s % own : s / 2; }
  static __device__ constexpr int kind_of_lane(int g) { return kinds == 1 ? 0 : g / 2 * kinds / 4; }
  static __device__ constexpr bool idle(int g, int t) {
    if (Grain == 256 || (Grain == 64 && F::unit != 32)) return false;
    return Grain == 16 && F::unit != 8 ? g / 2 != t : g / 2 % 2 != t / 2;
  }
};

// The lane's part of the block-diagonal x.
template <class F, int Grain>
struct Diagonal {
  using S = Spans<F, Grain>;
  std::uint32_t own[S::own][2];

  // x: the lane's words in the chunk, see `place`.
  __device__ __forceinline__ void load(const std::int8_t* x, bool idle) {
    if constexpr (Grain == 16 && F::unit == 8) {
#pragma unroll
      for (int k = 0; k < S::own; ++k) {
        const uint2 v = idle ? make_uint2(0, 0) : __ldg(reinterpret_cast<const uint2*>(x + 64 * k));
        own[k][0] = v.x, own[k][1] = v.y;
      }
    } else {
#pragma unroll
      for (int k = 0; k < S::own; k += 2) {
        const uint4 v = idle ? make_uint4(0, 0, 0, 0) : __ldg(reinterpret_cast<const uint4*>(x + 32 * k));
        own[k][0] = v.x, own[k][1] = v.y, own[k + 1][0] = v.z, own[k + 1][1] = v.w;
      }
    }
  }
  static __device__ __forceinline__ int place(int g, int t) {
    return g % 2 * kChunk + 16 * t + S::kind_of_lane(g) * (Grain == 64 ? 32 * S::own : 8);
  }
};

// Where a lane's rows (2 g and 2 g + 1 of a tile) are: numbers of blocks and codebooks, to which those of a chunk are added.
template <class F>
struct LaneRows {
  static constexpr int books = F::books;
  const std::uint8_t *idx, *sc;         // of the lane; idx in the layer's first block
  int block, book[books];               // the tile's first block; codebook of each row in strip 0

  __device__ __forceinline__ LaneRows(const LinearLayer& w, int tile, int g, int t)
      : idx(w.idx + 8 * g + 64 * F::words * t), sc(w.sc + static_cast<std::int64_t>(tile) * w.scale_pairs * 16 + 2 * g),
        block(tile * w.blocks) {
#pragma unroll
    for (int r = 0; r < books; ++r) book[r] = min((16 * tile + 2 * g + r) / w.group_rows, w.row_groups - 1) * w.strips;
  }

  __device__ __forceinline__ Codes<F> codes(const LinearBatch& batch, const LinearLayer& w, const Place& at, int t) const {
    Codes<F> found;
    found.load(ahead(idx, block + at.block(w), batch.block_bytes), at.live_blocks(w) * (32 / F::unit) - t);
    return found;
  }
  __device__ __forceinline__ const std::int8_t* codebook(const LinearBatch& batch, const LinearLayer& w, const Place& at, int r) const {
    return ahead(w.cb, book[F::books == 2 ? r : 0] + at.strip, batch.book_bytes);
  }
  __device__ __forceinline__ float group_scale(const LinearBatch& batch, const LinearLayer& w, const Place& at, int r) const {
    return bfloat(__ldg(ahead(w.gs, book[F::books == 2 ? r : 0] + at.strip, batch.gs_bytes)));
  }
  // Scales of both rows in the block of 16, 32 or 64 columns that starts at `column` of the chunk; past the columns, where activations
  // are 0, those of the rows' last block.
  __device__ __forceinline__ void block_scales(const LinearLayer& w, const Place& at, int column, float (&scale)[2]) const {
    const int of = min((at.block(w) * 32 + column) >> w.scale_shift, w.scale_blocks - 1);
    const std::uint8_t* pair = sc + (of >> 1) * 16;
    if constexpr (F::by_step) pair = ahead(sc, of >> 1, 16);      // or base and offset are kept apart, in 4 registers
    const std::uint32_t both = __ldg(reinterpret_cast<const std::uint16_t*>(pair)) >> 4 * (of & 1);
    scale[0] = __ldg(w.scale_table + 16 * of + (both & 15));
    scale[1] = __ldg(w.scale_table + 16 * of + (both >> 8 & 15));
  }
};

// A lane's part of a token.
template <class F, int Grain>
struct LaneInputs {
  const std::int8_t* x;             // of chunk 0
  const float* step;

  __device__ __forceinline__ LaneInputs(const LinearBatch& batch, const LinearLayer& w, int token, int g, int t)
      : x(batch.x + static_cast<std::int64_t>(token) * w.chunks * 2 * kChunk + Diagonal<F, Grain>::place(g, t)),
        step(batch.step + static_cast<std::int64_t>(token) * w.chunks * Spans<F, Grain>::count) {}
};

// The fragment of step j of round i of a chunk, in a format with LinearFormat::by_step.
template <class F>
__device__ __forceinline__ void decode_step(const Codes<F>& codes, const Table<F>& table, int i, int j, std::uint32_t (&a)[4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) a[n] = table.quad(codes, i, n % 2, 2 * j + n / 2);
}

// The weights of round i of a chunk: fragments of the mma, one for each step.
template <class F>
__device__ __forceinline__ void decode_round(const Codes<F>& codes, const Table<F>& table, int i, std::uint32_t (&a)[F::steps][4]) {
  if constexpr (F::by_step) {
#pragma unroll
    for (int j = 0; j < F::steps; ++j) decode_step(codes, table, i, j, a[j]);
  } else {
    std::uint32_t even[F::steps][2], odd[F::steps][2];
    table.decode(codes, i, 0, even);
    table.decode(codes, i, 1, odd);
#pragma unroll
    for (int j = 0; j < F::steps; ++j) a[j][0] = even[j][0], a[j][1] = odd[j][0], a[j][2] = even[j][1], a[j][3] = odd[j][1];
  }
}

// The products of one chunk, added to the lane's sums of rows 2 g and 2 g + 1.
template <class F, int Grain>
__device__ __forceinline__ void add_chunk(const LinearBatch& batch, const LinearLayer& w, const Place& at, const LaneRows<F>& rows,
                                          const Codes<F>& codes, const Table<F>& table, const LaneInputs<F, Grain>& inputs, bool idle,
                                          const std::uint32_t (&mask)[Spans<F, Grain>::kinds], int t, float (&sum)[2]) {
  using S = Spans<F, Grain>;
  Diagonal<F, Grain> x;
  x.load(ahead(inputs.x, at.chunk, batch.x_bytes), idle);
  std::int32_t c[S::tiles][4];
#pragma unroll
  for (int i = 0; i < S::tiles; ++i) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0;
#pragma unroll
  for (int i = 0; i < F::rounds; ++i) {
    std::uint32_t a[F::steps][4];
    if constexpr (!F::by_step) decode_round(codes, table, i, a);
#pragma unroll
    for (int j = 0; j < F::steps; ++j) {
      if constexpr (F::by_step) decode_step(codes, table, i, j, a[j]);
      const int s = i * F::steps + j;
      std::uint32_t b[2] = {x.own[S::turn(s)][0], x.own[S::turn(s)][1]};
      if constexpr (S::kinds > 1) b[0] *= mask[S::kind(s)], b[1] *= mask[S::kind(s)];      // the multiplier's pipe has nothing else to do
      mma_m16n8k32_s8(c[S::tile(s)], a[j], b);
    }
  }
  const float group[2] = {rows.group_scale(batch, w, at, 0), rows.group_scale(batch, w, at, 1)};
  const float* steps = ahead(inputs.step, at.chunk, batch.step_bytes);
#pragma unroll
  for (int i = 0; i < S::tiles; ++i) {
    const float step = __ldg(steps + S::span(i, t));
    float factor[2] = {group[0] * step, group[1] * step};
    if constexpr (Grain != 256) {
      float scale[2];
      rows.block_scales(w, at, Grain * S::span(i, t), scale);
      factor[0] *= scale[0], factor[1] *= scale[1];
    }
    sum[0] = fmaf(static_cast<float>(c[i][0] * batch.high_weight + c[i][1]), factor[0], sum[0]);
    sum[1] = fmaf(static_cast<float>(c[i][2] * batch.high_weight + c[i][3]), factor[1], sum[1]);
  }
}

template <class F, int Grain>
__device__ __forceinline__ void masks_of(int g, std::uint32_t (&mask)[Spans<F, Grain>::kinds]) {
#pragma unroll
  for (int k = 0; k < Spans<F, Grain>::kinds; ++k) mask[k] = opaque(Spans<F, Grain>::kind_of_lane(g) == k);
}

// Over the lanes of a row, where they hold different spans.
template <int Grain>
__device__ __forceinline__ void add_lanes(float (&sum)[2]) {
  if constexpr (Grain != 256) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int d = 1; d < 4; d *= 2) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], d);
  }
}

// By the whole warp.
template <class F>
__device__ __forceinline__ void fill_pairs(const std::int8_t* book, PairTable& table) {
  const auto* pairs = reinterpret_cast<const std::uint16_t*>(book) + lane_id();
  table.word[lane_id()] = prmt(__ldg(pairs), __ldg(pairs + F::codewords / 2), 0x5140);
  __syncwarp();
}

template <class F, int Warps>
constexpr int pair_tables = F::lookup == Lookup::warp_table ? 2 * Warps : 1;

// Has `table` find the codebooks of a chunk.  Where a warp has tables in shared memory, those at an even `turn` and behind it, it fills
// one after the other: a lane may still look something up in the last chunk's.
template <class F>
__device__ __forceinline__ void find_books(const LinearBatch& batch, const LinearLayer& w, const Place& at, const LaneRows<F>& rows,
                                           PairTable* tables, int& turn, Table<F>& table) {
  if constexpr (F::lookup == Lookup::warp_table) {
    fill_pairs<F>(rows.codebook(batch, w, at, 0), tables[turn]);
    table.table = shared_address(&tables[turn]);
    turn ^= 1;
  } else {
    table.load({rows.codebook(batch, w, at, 0), rows.codebook(batch, w, at, 1)});
  }
}

// The sum over the warps that work of what each left `stride` behind the one before.
__device__ __forceinline__ float over_warps(const float* from, int stride, const LinearLayer& w) {
  float total = from[0];
  for (int k = 1; k < w.warps; ++k) total += from[k * stride];
  return total;
}

// use(place, codes) of all chunks of a group kernel's CTA, the table in `entries` filled for each, in warps that have a tile.
template <class F, class Use>
__device__ __forceinline__ void walk_group(const LinearBatch& batch, const LinearLayer& w, const GroupPart& part, const LaneRows<F>& rows,
                                           uint4* entries, int t, Use use) {
#pragma unroll 1
  for (Place at(w, part.chunk); at.chunk < part.chunk_end; at.advance(w)) {
    const Codes<F> codes = rows.codes(batch, w, at, t);
    if (at.sub == 0 || at.chunk == part.chunk) {
      __syncthreads();
      fill_table<F>(rows.codebook(batch, w, at, 0), entries);
      __syncthreads();
    }
    if (part.works) use(at, codes);
  }
}

// One CTA per tile of 16 rows, whose warps take turns at the chunks.
template <class F, int Grain>
__global__ void __launch_bounds__(32 * kLinearWarps, 2) linear_tile_kernel(const __grid_constant__ LinearBatch batch) {
  static_assert(F::lookup != Lookup::cta_table, "a table for one tile");
  GPTVQ_SHARED(float, partial, kLinearWarps * 16);
  GPTVQ_SHARED(PairTable, tables, (pair_tables<F, kLinearWarps>));
  const int warp = uniform(threadIdx.x / 32), l = lane_id(), g = l / 4, t = l % 4, token = blockIdx.y;
  const LinearLayer& w = batch.layer[batch.layer_of(blockIdx.x)];
  const int tile = blockIdx.x - w.first_cta;
  const LaneRows<F> rows(w, tile, g, t);
  const LaneInputs<F, Grain> inputs(batch, w, token, g, t);
  std::uint32_t mask[Spans<F, Grain>::kinds];
  masks_of<F, Grain>(g, mask);
  const bool idle = Spans<F, Grain>::idle(g, t);

  float sum[2] = {0, 0};
  Table<F> table(batch.two_to_16);
  int turn = warp * 2;
#pragma unroll 1
  for (Place at(w, warp < w.warps ? warp : w.chunks); at.chunk < w.chunks; at.advance(w)) {
    const Codes<F> codes = rows.codes(batch, w, at, t);
    find_books<F>(batch, w, at, rows, tables, turn, table);
    add_chunk<F, Grain>(batch, w, at, rows, codes, table, inputs, idle, mask, t, sum);
  }
  add_lanes<Grain>(sum);
  if (t == 0) {
    partial[warp * 16 + 2 * g] = sum[0];
    partial[warp * 16 + 2 * g + 1] = sum[1];
  }
  __syncthreads();
  const int row = 16 * tile + threadIdx.x;
  if (threadIdx.x < 16 && row < w.rows) put_output(batch, w, token, row, over_warps(partial + threadIdx.x, 16, w));
}

// Formats with a table for the whole CTA: one CTA per up to 16 tiles of a row group, a tile for each warp, that walks along the chunks of
// its split.  Sums of several splits go to `partial`.
template <class F, int Grain>
__global__ void __launch_bounds__(32 * kLinearWarps, 2) linear_group_kernel(const __grid_constant__ LinearBatch batch) {
  static_assert(F::lookup == Lookup::cta_table && F::codewords == 256, "a table of 32 KB");
  GPTVQ_SHARED(uint4, entries, 256 * 8);
  const int warp = uniform(threadIdx.x / 32), l = lane_id(), g = l / 4, t = l % 4, token = blockIdx.y;
  const LinearLayer& w = batch.layer[batch.layer_of(blockIdx.x)];
  const GroupPart part(w, blockIdx.x - w.first_cta, warp);
  const LaneRows<F> rows(w, part.tile, g, t);
  const LaneInputs<F, Grain> inputs(batch, w, token, g, t);
  std::uint32_t mask[Spans<F, Grain>::kinds];
  masks_of<F, Grain>(g, mask);
  const bool idle = Spans<F, Grain>::idle(g, t);

  float sum[2] = {0, 0};
  const Table<F> table(entries, l);
  walk_group<F>(batch, w, part, rows, entries, t, [&](const Place& at, const Codes<F>& codes) {
    add_chunk<F, Grain>(batch, w, at, rows, codes, table, inputs, idle, mask, t, sum);
  });
  add_lanes<Grain>(sum);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * part.tile + 2 * g + r;
    if (part.works && t == 0 && row < w.rows) put_sum(batch, w, part.split, token, row, sum[r]);
  }
}

}  // namespace gptvq
