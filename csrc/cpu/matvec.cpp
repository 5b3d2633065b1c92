// A dense bfloat16 matrix times one vector: nothing but reading the matrix, which PyTorch does at half the speed of memory.
#include "cpu/matvec.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "cpu/float16.h"
#include "cpu/simd.h"

namespace gptvq {
namespace {

using std::int64_t;

constexpr int64_t kRows = 4;                    // at a time: they share the loads of x
constexpr int64_t kLine = 32;                   // columns in a cache line
constexpr int64_t kAhead = 2048;                // bytes asked for before they are read
constexpr int64_t kBytesPerPart = 256 << 10;    // less is not worth another thread

// The vector x as floats, its even columns and its odd ones.  Two neighbours of W lie in one word: the upper half is a float32
// already, the lower one if shifted.
struct Inputs {
  const float *even, *odd;
};

// sums[r] = the first `cols` columns, a multiple of kLine, of row r of W (rows `stride` apart) times x, by vectors of L lanes.
template <int N, int L>
GPTVQ_INLINE void some_rows(const std::uint16_t* W, Inputs x, int64_t cols, int64_t stride, float* sums) {
  typedef float Floats __attribute__((vector_size(4 * L)));
  typedef std::int32_t Words __attribute__((vector_size(4 * L)));
  Floats sum[N] = {};
  for (int64_t c = 0; c < cols; c += kLine) {
    for (int r = 0; r < N; ++r) __builtin_prefetch(reinterpret_cast<const char*>(W + r * stride + c) + kAhead);
    for (int64_t i = c; i < c + kLine; i += 2 * L) {
      Floats even, odd;
      std::memcpy(&even, x.even + i / 2, sizeof even);
      std::memcpy(&odd, x.odd + i / 2, sizeof odd);
      for (int r = 0; r < N; ++r) {
        Words pairs;
        std::memcpy(&pairs, W + r * stride + i, sizeof pairs);
        const Words lower = pairs << 16, upper = pairs & static_cast<std::int32_t>(0xffff0000u);
        Floats left, right;
        std::memcpy(&left, &lower, sizeof left);
        std::memcpy(&right, &upper, sizeof right);
        sum[r] += left * even;
        sum[r] += right * odd;
      }
    }
  }
  for (int r = 0; r < N; ++r) {
    sums[r] = 0;
    for (int i = 0; i < L; ++i) sums[r] += sum[r][i];
  }
}

template <int L>
GPTVQ_INLINE void rows(const std::uint16_t* W, Inputs x, const float* bias, int64_t first, int64_t last, int64_t cols, std::uint16_t* y) {
  const int64_t whole = cols / kLine * kLine;
  for (int64_t row = first; row < last; row += kRows) {
    float sums[kRows];
    const int64_t count = std::min(kRows, last - row);
    if (count == kRows)
      some_rows<kRows, L>(W + row * cols, x, whole, cols, sums);
    else
      for (int64_t r = 0; r < count; ++r) some_rows<1, L>(W + (row + r) * cols, x, whole, cols, sums + r);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = whole; c < cols; ++c) sums[r] += to_float(BFloat{W[(row + r) * cols + c]}) * (c % 2 ? x.odd : x.even)[c / 2];
      y[row + r] = round_to<BFloat>(sums[r] + (bias ? bias[row + r] : 0.f)).bits;
    }
  }
}

#define GPTVQ_ROWS(name, L)                                                                                                            \
  GPTVQ_PER_ISA(name, (const std::uint16_t* W, Inputs x, const float* bias, int64_t first, int64_t last, int64_t cols, std::uint16_t* y), \
                (rows<L>(W, x, bias, first, last, cols, y)))
GPTVQ_ROWS(rows_16, 16)
GPTVQ_ROWS(rows_8, 8)
GPTVQ_ROWS(rows_4, 4)

}  // namespace

void matvec(const std::uint16_t* W, const std::uint16_t* x, const float* bias, int64_t rows, int64_t cols, std::uint16_t* y, int threads) {
  std::vector<float> floats(static_cast<std::size_t>(cols + 1));
  float *even = floats.data(), *odd = even + (cols + 1) / 2;
  for (int64_t c = 0; c < cols; ++c) (c % 2 ? odd : even)[c / 2] = to_float(BFloat{x[c]});
  const auto some = isa() == Isa::avx512 ? rows_16 : isa() == Isa::avx2 ? rows_8 : rows_4;
  const int64_t useful = std::clamp<int64_t>(rows * cols * 2 / kBytesPerPart, 1, std::max(1, threads));
  const int64_t size = (rows / (useful * 4) / kRows + 1) * kRows, parts = (rows + size - 1) / size;
  parallel_for(parts, useful, [&](int64_t part) {
    some(W, {even, odd}, bias, part * size, std::min(rows, (part + 1) * size), cols, y);
  }, true);
}

}  // namespace gptvq
