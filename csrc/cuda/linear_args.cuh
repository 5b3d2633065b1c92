// What the kernels of y = W x are told; filled in by linear.cu.
#pragma once
#include "cuda/linear_decode.cuh"

namespace gptvq {

// One packed weight.  Its rows are cut into tiles of 16, its columns into strips (of one codebook each) and those into chunks.
struct LinearLayer {
  const std::uint8_t* idx;
  const std::int8_t* cb;
  const std::uint16_t* gs;          // bfloat16
  const std::uint8_t* sc;           // null without block scales
  const float* scale_table;
  const float* bias;                // null without
  void* y;                          // [tokens, rows]
  int rows, tiles, blocks, row_groups, group_rows, group_tiles, strips, strip_blocks, strip_chunks, chunks;
  int scale_pairs, scale_blocks, scale_shift;   // of two scale blocks: bytes apart; log2 of a scale block's columns
  int warps, turn, turn_strips, turn_subs;      // at work in a CTA; chunks from a warp's to its next, in whole strips and the rest
  int first_cta, first_row;         // among all layers of the launch
  // CTAs that share the chunks of a row; where there are several, their sums are at `partial`, [splits, tokens, rows]
  int splits;
  float* partial;
};

// Activations on their way to integers.
struct Inputs {
  const void* x;                    // [tokens, cols] of `type`
  std::int8_t* planes;              // see LinearBatch
  float* step;
  int tokens, type, cols, limit;    // limit: the largest integer, 127 or 254 * 127 + 126
  int span;                         // columns with a common step: 256, 64, 32 or 16
};

constexpr int kLinearWarps = 16, kTokensWarps = 8;      // most of a CTA, for one token and for several
constexpr int kQuantizeWarps = 4;
constexpr int kMostLayers = 8;      // of a launch: the parameters of a kernel have 4 KB

struct LinearBatch {
  LinearLayer layer[kMostLayers];
  int layers, tokens, type;         // type of x and y: 0 float32, 1 float16, 2 bfloat16
  // x = step * (high_weight * high + low), bytes in the order of LinearFormat::column_at: [tokens, chunks, 2, 256], high before low;
  // steps [tokens, chunks, spans of a chunk]
  const std::int8_t* x;
  const float* step;
  int high_weight;
  // Bytes from one block of indices, codebook, chunk of x, chunk's steps to the next: run-time constants, so that the multiplier
  // computes addresses, and not the pipe that looks codes up.
  int block_bytes, book_bytes, x_bytes, step_bytes, gs_bytes;
  std::uint32_t two_to_16;
  int total_rows;                   // of all layers

  __device__ __forceinline__ int layer_of(int cta) const {
    int l = 0;
    while (l + 1 < layers && cta >= layer[l + 1].first_cta) ++l;
    return l;
  }
};

// A chunk of a layer: its place among the strips.
struct Place {
  int chunk, strip, sub;

  __device__ __forceinline__ Place(const LinearLayer& w, int first)
      : chunk(first), strip(first / w.strip_chunks), sub(first % w.strip_chunks) {}
  // The place `w.turn` chunks further.
  __device__ __forceinline__ void advance(const LinearLayer& w) {
    chunk += w.turn, strip += w.turn_strips, sub += w.turn_subs;
    if (sub >= w.strip_chunks) sub -= w.strip_chunks, ++strip;
  }
  __device__ __forceinline__ int block(const LinearLayer& w) const { return strip * w.strip_blocks + sub * (kChunk / 32); }
  __device__ __forceinline__ int live_blocks(const LinearLayer& w) const {
    return min(min(kChunk / 32, w.strip_blocks - sub * (kChunk / 32)), w.blocks - block(w));
  }
};

// The same in all lanes, and known to be so.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }

__device__ __forceinline__ float bfloat(std::uint16_t bits) { return __uint_as_float(static_cast<std::uint32_t>(bits) << 16); }

__device__ __forceinline__ float load_as_float(const void* x, int type, long long i) {
  if (type == 0) return static_cast<const float*>(x)[i];
  if (type == 1) return __half2float(static_cast<const __half*>(x)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(x)[i]);
}

__device__ __forceinline__ void store_rounded(void* y, int type, long long i, float v) {
  if (type == 0) static_cast<float*>(y)[i] = v;
  else if (type == 1) static_cast<__half*>(y)[i] = __float2half_rn(v);
  else static_cast<__nv_bfloat16*>(y)[i] = __float2bfloat16_rn(v);
}

__device__ __forceinline__ void put_output(const LinearBatch& batch, const LinearLayer& w, int token, int row, float sum) {
  store_rounded(w.y, batch.type, static_cast<std::int64_t>(token) * w.rows + row, sum + (w.bias ? w.bias[row] : 0.f));
}

// What a warp of a group kernel does: one of the CTA's tiles of a row group, and the CTA's chunks.
struct GroupPart {
  int split, tile, chunk, chunk_end;
  bool works;                       // else there is no tile for the warp, and it only helps with the table; `tile` is the CTA's first

  __device__ __forceinline__ GroupPart(const LinearLayer& w, int cta, int warp) : split(cta % w.splits) {
    const int per_group = (w.group_tiles + w.warps - 1) / w.warps, part = cta / w.splits, group = part / per_group;
    const int first = group * w.group_tiles + part % per_group * w.warps;
    works = warp < w.warps && first + warp < min((group + 1) * w.group_tiles, w.tiles);
    tile = works ? first + warp : first;
    chunk = w.chunks * split / w.splits;
    chunk_end = w.chunks * (split + 1) / w.splits;
  }
};

// entries: centroid e, its dimensions one byte each, at [8 e .. 8 e + 8), 4 bytes for every bank; by the whole CTA.  What 8 lanes
// write at a time lies in different banks.
template <class F>
__device__ __forceinline__ void fill_table(const std::int8_t* book, uint4* entries) {
  for (unsigned e = threadIdx.x; e < F::codewords; e += blockDim.x) {
    std::uint32_t word = 0;
#pragma unroll
    for (int d = 0; d < F::dim; ++d) word |= (static_cast<std::uint32_t>(__ldg(book + d * F::codewords + e)) & 255) << 8 * d;
#pragma unroll
    for (int k = 0; k < 8; ++k) entries[(8 * e | e % 8) ^ k] = make_uint4(word, word, word, word);
  }
}

__device__ __forceinline__ void put_sum(const LinearBatch& batch, const LinearLayer& w, int split, int token, int row, float sum) {
  if (w.splits > 1)
    w.partial[(static_cast<std::int64_t>(split) * batch.tokens + token) * w.rows + row] = sum;
  else
    put_output(batch, w, token, row, sum);
}

}  // namespace gptvq
