#include "cpu/linear_exact.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "cpu/float16.h"
#include "cpu/simd.h"

namespace gptvq {
namespace {

// The sum of w [i] x [i].
GPTVQ_INLINE void product(const float* w, const float* x, std::int64_t count, double* out) {
  Vec sum = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec a, b;
    __builtin_memcpy(&a, w + i, sizeof a);
    __builtin_memcpy(&b, x + i, sizeof b);
    sum += a * b;
  }
  *out = 0;
  for (int l = 0; l < kLanes; ++l) *out += static_cast<double>(sum[l]);
  for (; i < count; ++i) *out += static_cast<double>(w[i]) * static_cast<double>(x[i]);
}

GPTVQ_PER_ISA(dot, (const float* w, const float* x, std::int64_t count, double* out), product(w, x, count, out))

void put(void* y, OutType type, std::int64_t at, float value) {
  switch (type) {
    case OutType::float32: static_cast<float*>(y)[at] = value; break;
    case OutType::float16: static_cast<Half*>(y)[at] = round_to<Half>(value); break;
    case OutType::bfloat16: static_cast<BFloat*>(y)[at] = round_to<BFloat>(value); break;
  }
}

}  // namespace

void linear_exact(const Packed& weight, const Spec& spec, const float* bias, const float* x, std::int64_t tokens, void* y, OutType type,
                  int threads) {
  parallel_for(spec.tiles(), threads, [&](std::int64_t tile) {
    static thread_local std::vector<float> rows;
    rows.resize(static_cast<std::size_t>(Spec::tile_rows * spec.cols));
    dequantize(weight, rows.data(), OutType::float32, spec, tile, tile + 1);
    for (std::int64_t row = tile * Spec::tile_rows; row < std::min(spec.rows, (tile + 1) * Spec::tile_rows); ++row)
      for (std::int64_t t = 0; t < tokens; ++t) {
        double sum;
        dot(rows.data() + row % Spec::tile_rows * spec.cols, x + t * spec.cols, spec.cols, &sum);
        put(y, type, t * spec.rows + row, static_cast<float>(sum + (bias ? static_cast<double>(bias[row]) : 0.0)));
      }
  });
}

}  // namespace gptvq
