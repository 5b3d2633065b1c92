// What linear.cpp hands to the kernels of an instruction set; plain C types only.
#pragma once
#include <stdint.h>

namespace gptvq {

// Columns of one token that share an activation step, and where the block scales of their weights are.
struct LinearSpan {
  float step;
  int32_t hi_sum, lo_sum;       // -128 * sum of the integers: what weights stored with an offset of 128 add too much
  int32_t codes;                // bytes from a tile's first pair of scale codes to that of the span
  int64_t shift;                // of its code in the pair: 0 or 4 bits
  int64_t table;                // floats from the first table of scales to that of the span
};

struct LinearArgs {
  // Packed weight, shapes as in gptvq.weight.VQWeight.
  const uint8_t* idx;
  const int8_t* cb;
  const uint16_t* gs;           // bfloat16, repacked: [tiles, strips, groups per tile], 16 readable entries past the end
  const uint8_t* sc;            // null without block scales
  const float* scale_table;
  int64_t rows, blocks, row_groups, strips, group_rows, scale_block;
  int64_t scale_blocks;         // per row
  int64_t strip_blocks;         // blocks of 32 columns per strip
  int64_t groups_per_tile;      // 1: a tile's rows share their codebooks
  uint8_t lane_offset[16];      // for 4 rows with 16 table entries: where the entries of each row begin, 4 equal bytes a row
  uint8_t row_group[16];        // row of a tile -> its group, below groups_per_tile
  uint8_t slot_group[16];       // with 16 table entries per 4 rows: 16 / K codebooks each -> their groups

  // Activations, [tokens, blocks * 32] in the kernels' order or in teams (linear_wide.h, linear_amx.cpp), and their spans
  // [tokens, spans].  From the start of a cache line on, with room for 16 tokens and 64 columns or multiples of them in teams.
  int64_t tokens;
  int8_t *hi, *lo;              // one after the other: kernels of 16-bit activations take them as one array
  LinearSpan* span;
  float* step;                  // of the spans again, [spans, tokens], for kernels of many tokens
  int64_t spans, span_blocks;

  // y [tokens, y_stride] of `type`: 0 float32, 1 float16, 2 bfloat16; bias float32 [rows] or null
  void* y;
  int64_t y_stride;
  int type;
  const float* bias;
};

// The kernels of one format on one instruction set.
struct LinearKernel {
  // y of the tiles [first, last); scratch of linear_scratch(tokens) floats, aligned to 64 bytes.
  void (*tiles)(const LinearArgs&, int64_t first, int64_t last, float* scratch);
  // Activations of one token, x float32 [blocks * 32] with zeros past the layer's columns, into hi, lo and span.
  void (*quantize)(const LinearArgs&, const float* x, int64_t token);
  // The weights of the tiles [first, last) into y, which begins with row 16 * first and has y_stride = the layer's columns; null
  // where the set has no such kernel.  Entries of signed formats must be 1 to 127.
  void (*unpack)(const LinearArgs&, int64_t first, int64_t last) = nullptr;
};

inline int64_t linear_scratch(int64_t tokens) { return 32 * tokens; }     // 32 rows at a time

// planes: 1 for a8, 2 for a16; one_book: see groups_per_tile; halves: scale_block is 16
using LinearKernels = LinearKernel (*)(int code_bits, int dim, int planes, bool one_book, bool halves);
LinearKernel linear_amx(int code_bits, int dim, int planes, bool one_book, bool halves);
LinearKernel linear_avx512(int code_bits, int dim, int planes, bool one_book, bool halves);
LinearKernel linear_avx2(int code_bits, int dim, int planes, bool one_book, bool halves);
LinearKernel linear_neon(int code_bits, int dim, int planes, bool one_book, bool halves);
bool neon_dotprod();            // whether this processor has the dot product instructions
LinearKernel linear_scalar(int code_bits, int dim, int planes, bool one_book, bool halves);

}  // namespace gptvq
