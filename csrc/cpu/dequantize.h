#pragma once
#include "common/tensor.h"

namespace gptvq {

// One packed weight; shapes as in gptvq.weight.VQWeight.
struct Packed {
  const std::uint8_t* idx;      // [tiles, blocks, block_bytes]
  const std::int8_t* cb;        // [row groups, strips, dim, K]
  const std::uint16_t* gs;      // bfloat16 [row groups, strips]
  const std::uint8_t* sc;       // [tiles, ceil(scale blocks / 2), 16], or null without block scales
  const float* scale_table;     // [scale blocks, 16], or null
};

enum class OutType { float32, float16, bfloat16 };

// out [rows, cols] = round(float(cb) * float(gs) * scale): float32 products in this order, rounded once to `type`.
// Large weights are split over `threads` threads by rows; the result does not depend on their number.
void dequantize(const Packed& weight, void* out, OutType type, const Spec& spec, int threads);

// The rows of one tile alone: out [16, cols], float32; rows past the layer's are left as they are.
void dequantize_tile(const Packed& weight, float* out, const Spec& spec, std::int64_t tile);

}  // namespace gptvq
