// pack, unpack: one thread per row of a block.  dequantize: one CTA per tile of 16 rows and some blocks of 32 columns.
//
//   a warp takes a block in two halves of 8 rows:   lane 4 r + q  ->  row r, columns 8 q .. 8 q + 7
//   so its codes are one or two words, and its outputs 16 or 32 bytes beside those of the next lane
//
// The codebooks that the CTA's rows and columns need lie in shared memory, a vector's values together; where they would not fit
// (groups of a few weights) they are read from where they are.
#pragma once
#include "cuda/layout.cuh"

namespace gptvq {

struct PackedView {
  const std::uint8_t* idx;
  const std::int8_t* cb;
  const std::uint16_t* gs;        // bfloat16
  const std::uint8_t* sc;         // null without block scales
  const float* scale_table;
  int rows, cols, group_rows, group_cols, strips, blocks, scale_block, scale_pairs;
};

struct CodesShape { int rows, vectors, blocks; long long total; };    // total: rows of blocks, padding included

constexpr int kPackThreads = 256, kDequantizeWarps = 4;
// CTAs of dequantize on a multiprocessor, where the compiler has to be told: for signs it would take 32 registers a thread, and spill.
template <int Bits>
constexpr int kDequantizeCtas = Bits > 8 ? 12 : 0;

// Row i of all blocks, of which a thread of pack and unpack has one.
template <class Layout>
struct BlockRow {
  long long row, codes, word;     // of the weight, padding included; where its codes begin, and its word of plane 0 in bytes
  int first;                      // vector of the row

  __device__ __forceinline__ BlockRow(const CodesShape& s, long long i) {
    const int block = static_cast<int>(i / 16 % s.blocks);
    const long long tile = i / 16 / s.blocks;
    row = tile * 16 + i % 16;
    codes = row * s.vectors;
    word = (tile * s.blocks + block) * Layout::block_bytes + 4 * (i % 16);
    first = block * Layout::vectors;
  }
};

template <int Bits, int Dim>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const void* __restrict__ codes, std::uint8_t* __restrict__ idx,
                                                            CodesShape s) {
  using Layout = DeviceLayout<Bits, Dim>;
  const long long i = static_cast<long long>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (i >= s.total) return;
  const BlockRow<Layout> at(s, i);
  const auto* from = static_cast<const typename Layout::Code*>(codes) + at.codes;
  std::uint32_t quads[Layout::quads + Layout::has_signs] = {};
#pragma unroll
  for (int q = 0; q < Layout::quads; ++q) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int v = at.first + 4 * q + j;
      if (at.row >= s.rows || v >= s.vectors) continue;
      const std::uint32_t code = from[v];
      quads[q] |= (code & (Layout::codewords - 1)) << 8 * j;
      if constexpr (Layout::has_signs) quads[Layout::quads] |= Layout::spread_signs(code >> 8 & 15, 4 * q + j);
    }
  }
  Layout::encode(reinterpret_cast<std::uint32_t*>(idx + at.word), [&](int q) { return quads[q]; });
}

template <int Bits, int Dim>
__global__ void __launch_bounds__(kPackThreads) unpack_kernel(const std::uint8_t* __restrict__ idx, void* __restrict__ codes,
                                                              CodesShape s) {
  using Layout = DeviceLayout<Bits, Dim>;
  const long long i = static_cast<long long>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (i >= s.total) return;
  const BlockRow<Layout> at(s, i);
  if (at.row >= s.rows) return;
  using Code = typename Layout::Code;
  const auto* from = reinterpret_cast<const std::uint32_t*>(idx + at.word);
  Code* to = static_cast<Code*>(codes) + at.codes;
#pragma unroll
  for (int q = 0; q < Layout::quads; ++q) {
    const std::uint32_t quad = Layout::quad(from, q);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int v = at.first + 4 * q + j;
      if (v >= s.vectors) continue;
      std::uint32_t code = quad >> 8 * j & 255;
      if constexpr (Layout::has_signs) code |= Layout::gather_signs(Layout::signs(from), 4 * q + j) << 8;
      to[v] = static_cast<Code>(code);
    }
  }
}

__device__ __forceinline__ void round_to(float v, float& out) { out = v; }
__device__ __forceinline__ void round_to(float v, __half& out) { out = __float2half_rn(v); }
__device__ __forceinline__ void round_to(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// What a CTA of dequantize_kernel decodes, and whose codebooks that takes.
struct DequantizePart {
  int row, row_end, block, block_end, group, groups, strip, strips;

  __device__ DequantizePart(const PackedView& w, int tile, int chunk, int chunk_blocks)
      : row(tile * 16), row_end(min(row + 16, w.rows)), block(chunk * chunk_blocks), block_end(min(block + chunk_blocks, w.blocks)),
        group(row / w.group_rows), groups((row_end - 1) / w.group_rows - group + 1), strip(block * 32 / w.group_cols),
        strips((min(block_end * 32, w.cols) - 1) / w.group_cols - strip + 1) {}
};

// tabled: the codebooks of every part fit into the dynamic shared memory that the launch has.
template <int Bits, int Dim, class Out>
__global__ void __launch_bounds__(32 * kDequantizeWarps, kDequantizeCtas<Bits>) dequantize_kernel(
    PackedView w, Out* __restrict__ out, int chunks, int chunk_blocks, bool tabled, bool aligned) {
  using Layout = DeviceLayout<Bits, Dim>;
  constexpr int K = Layout::codewords, book_bytes = K * Dim;
  GPTVQ_DYN_SMEM(std::int8_t, table);
  const int tile = blockIdx.x / chunks, lane = threadIdx.x % 32, q = lane % 4;
  const DequantizePart part(w, tile, blockIdx.x % chunks, chunk_blocks);
  if (tabled) {
    for (int i = threadIdx.x; i < part.groups * part.strips * book_bytes; i += 32 * kDequantizeWarps) {
      const int book = i / book_bytes, at = i % book_bytes;
      const long long from = static_cast<long long>(part.group + book / part.strips) * w.strips + part.strip + book % part.strips;
      table[book * book_bytes + at % K * Dim + at / K] = w.cb[from * book_bytes + at];
    }
    __syncthreads();
  }
  for (int i = threadIdx.x / 32; i < 2 * (part.block_end - part.block); i += kDequantizeWarps) {
    const int block = part.block + i / 2, r = lane / 4 + i % 2 * 8, row = part.row + r, first = block * 32 + 8 * q;
    if (row >= part.row_end || first >= w.cols) continue;
    const long long tile_block = static_cast<long long>(tile) * w.blocks + block;
    const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(w.idx + tile_block * Layout::block_bytes) + r;
    std::uint32_t codes[Dim == 1 ? 2 : 1];
    if constexpr (Dim == 1) {
      codes[0] = Layout::quad(words, 2 * q);
      codes[1] = Layout::quad(words, 2 * q + 1);
    } else {
      codes[0] = Dim == 2 ? Layout::quad(words, q) : Layout::quad(words, q / 2) >> 16 * (q % 2);
    }
    if constexpr (Layout::has_signs) {              // above both numbers
      const std::uint32_t signs = Layout::signs(words);
      codes[0] = (codes[0] & 0xffff) | Layout::gather_signs(signs, 2 * q) << 16 | Layout::gather_signs(signs, 2 * q + 1) << 20;
    }
    float scale = 1;
    if (w.sc) {
      const int of = first / w.scale_block;
      const int code = w.sc[(static_cast<long long>(tile) * w.scale_pairs + of / 2) * 16 + r] >> 4 * (of % 2) & 15;
      scale = w.scale_table[of * 16 + code];
    }
    const int group = row / w.group_rows;
    int strip = first / w.group_cols - 1, strip_end = first;
    const std::int8_t* book = nullptr;
    float gs = 0;
    Out values[8];
#pragma unroll
    for (int v = 0; v < 8 / Dim; ++v) {
      if (first + v * Dim >= w.cols) break;
      if (first + v * Dim >= strip_end) {
        strip_end = (++strip + 1) * w.group_cols;
        const long long of = static_cast<long long>(group) * w.strips + strip;
        gs = __uint_as_float(static_cast<std::uint32_t>(w.gs[of]) << 16);
        book = tabled ? table + ((group - part.group) * part.strips + strip - part.strip) * book_bytes : w.cb + of * book_bytes;
      }
      const int code = codes[v / 4] >> 8 * (v % 4) & (K - 1);
#pragma unroll
      for (int d = 0; d < Dim; ++d) {
        float value = __fmul_rn(static_cast<float>(tabled ? book[code * Dim + d] : book[d * K + code]), gs);
        if constexpr (Layout::has_signs) value = negated_if(codes[0] >> (16 + 4 * v + d), value);
        round_to(w.sc ? __fmul_rn(value, scale) : value, values[v * Dim + d]);
      }
    }
    Out* to = out + static_cast<long long>(row) * w.cols + first;
    if (aligned && first + 8 <= w.cols) {
      uint4 words_out[sizeof(Out) / 2];
      memcpy(words_out, values, sizeof values);
#pragma unroll
      for (int p = 0; p < static_cast<int>(sizeof(Out)) / 2; ++p) reinterpret_cast<uint4*>(to)[p] = words_out[p];
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (first + j < w.cols) to[j] = values[j];
    }
  }
}

}  // namespace gptvq
