#pragma once
#include <cstdint>

namespace gptvq {

// Element (i, j) is data[i * row + j * col], float32 or bfloat16.
struct Matrix {
  const void* data;
  bool bfloat16;
  std::int64_t row, col;
};

// C [m, n] (rows `stride` apart) = or, if `add`, += sign * A [m, k] B [k, n], in float32.  Each element is summed in an order
// that does not depend on the number of threads.  `upper`: of a square C the part below the diagonal may be left as it is.
struct Product {
  std::int64_t m, n, k;
  float sign;
  bool add, upper;
};
void matmul(const Product& p, const Matrix& A, const Matrix& B, float* C, std::int64_t stride, int threads);

// The instruction set that products of float32 or of bfloat16 take here.
const char* product_instructions(bool bfloat16);

}  // namespace gptvq
