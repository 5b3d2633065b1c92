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

// out [rows of the tiles [first, last), cols] = round(float(cb) * float(gs) * scale): float32 products in this order, rounded once
// to `type`.
void dequantize(const Packed& weight, void* out, OutType type, const Spec& spec, std::int64_t first, std::int64_t last);

}  // namespace gptvq
