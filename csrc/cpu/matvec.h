#pragma once
#include <cstdint>

namespace gptvq {

// y [rows] = W x + bias: W [rows, cols], x and y bfloat16, summed in float32 and rounded once; bias float32, or null.
// The same bits for any number of threads.
void matvec(const std::uint16_t* W, const std::uint16_t* x, const float* bias, std::int64_t rows, std::int64_t cols, std::uint16_t* y,
            int threads);

}  // namespace gptvq
