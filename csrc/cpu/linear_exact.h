#pragma once
#include "cpu/dequantize.h"

namespace gptvq {

// y [tokens, rows] of `type` = x float32 [tokens, cols] times the dequantized weight transposed, plus bias float32 [rows] or null;
// for any shape, in float32 with the sums of 16 columns' worth of products apart and added in double.
void linear_exact(const Packed& weight, const Spec& spec, const float* bias, const float* x, std::int64_t tokens, void* y, OutType type,
                  int threads);

}  // namespace gptvq
