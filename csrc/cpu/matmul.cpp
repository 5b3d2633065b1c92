// Matrix products in float32.  Other libraries' products run at half the speed or less on processors of another make than
// theirs, or depend on the number of threads in the last bits.
//
// A is packed in panels of `rows` rows, B in panels of `cols` columns, k contiguous steps each (but for `tiles`, see pack_tiles());
// zeros fill the last ones up.
// A tile of C, rows x cols, lives in registers while one depth block of both panels passes by:
//
//            B panel [k][cols]
//            |||||||
//   A panel  C tile        for a chunk of rows (in the second cache), for a panel of B (in the first), depth by depth
//   [k][rows]
#include "cpu/matmul.h"

#include <algorithm>
#include <cstring>

#include "common/aligned.h"
#include "common/parallel.h"
#include "cpu/amx.h"
#include "cpu/simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif


namespace gptvq {
namespace {

using std::int64_t;

constexpr int64_t kDepth = 192;      // steps of k per tile visit: a panel of B of 48 columns takes 36 KiB
constexpr int64_t kChunk = 96;       // rows of A per part, a multiple of every tile's
constexpr int64_t kMost = 2048;      // steps of k packed at a time

// C tile [MR, NV * L] = or += a [k][MR] * b [k][NV * L].
template <int MR, int NV, int L>
GPTVQ_INLINE void tile(const float* a, const float* b, float* c, int64_t stride, int64_t k, bool add) {
  typedef float Vec __attribute__((vector_size(4 * L)));
  Vec sum[MR][NV] = {};
  for (int64_t p = 0; p < k; ++p, a += MR, b += NV * L) {
    Vec right[NV];
    for (int j = 0; j < NV; ++j) std::memcpy(&right[j], b + j * L, sizeof(Vec));
    for (int i = 0; i < MR; ++i) {
      const Vec left = a[i] - Vec{};       // not a[i] + 0, which for -0 is another number and so costs an addition
      for (int j = 0; j < NV; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) {
      float* to = c + i * stride + j * L;
      if (add) {
        Vec before;
        std::memcpy(&before, to, sizeof(Vec));
        sum[i][j] += before;
      }
      std::memcpy(to, &sum[i][j], sizeof(Vec));
    }
}

// What a packed number is: a float32, or two bfloat16, those of two steps of k; `tiles`: with sixteen pairs of a row of A side by side.
enum class Packing { numbers, pairs, tiles };
constexpr int64_t kTile = 16;

struct Kernel {
  const char* name;
  int64_t rows, cols;
  void (*tile)(const float*, const float*, float*, int64_t, int64_t, bool);
  Packing packing = Packing::numbers;
  void (*begin)() = nullptr, (*end)() = nullptr;        // called by each thread around its tiles

  // Packed numbers of so many steps of k.
  int64_t depth(int64_t steps) const {
    const int64_t pairs = (steps + 1) / 2;
    return packing == Packing::numbers ? steps : packing == Packing::pairs ? pairs : (pairs + kTile - 1) / kTile * kTile;
  }
};

// As many vectors of C as the registers hold beside one row of B and an element of A.
#define GPTVQ_TILE(name, MR, NV, L)                                                                             \
  GPTVQ_PER_ISA(name, (const float* a, const float* b, float* c, int64_t stride, int64_t k, bool add),          \
                (tile<MR, NV, L>(a, b, c, stride, k, add)))
GPTVQ_TILE(tile_8x48, 8, 3, 16)
GPTVQ_TILE(tile_6x16, 6, 2, 8)
GPTVQ_TILE(tile_4x8, 4, 2, 4)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define GPTVQ_BFLOAT16 1
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void tile_pairs(const float* a, const float* b, float* c, int64_t stride,
                                                                                int64_t k, bool add) {
  constexpr int rows = 8, vectors = 3;
  __m512 sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t p = 0; p < k; ++p, a += rows, b += vectors * kLanes) {
    __m512 right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = _mm512_load_ps(b + j * kLanes);
    for (int i = 0; i < rows; ++i) {
      const __m512 left = _mm512_set1_ps(a[i]);
      for (int j = 0; j < vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * stride + j * kLanes;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]) : sum[i][j]);
    }
}
#endif

#ifdef GPTVQ_AMX
__attribute__((target("amx-tile"))) void begin_tiles() {
  struct alignas(64) {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t lines[16] = {};
  } shapes;
  for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.lines[i] = kTile;
  asm volatile("" : : "r"(&shapes) : "memory");      // the compiler thinks that only the first bytes are read
  _tile_loadconfig(&shapes);
}

__attribute__((target("amx-tile"))) void end_tiles() { _tile_release(); }

// C in four tiles.  The compiler does not know what their instructions read and write.
__attribute__((target("amx-tile,amx-bf16"))) void tile_amx(const float* a, const float* b, float* c, int64_t stride, int64_t k, bool add) {
  constexpr int64_t cols = 2 * kTile, block = kTile * kTile;
  asm volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, c, stride * 4);
    _tile_loadd(1, c + kTile, stride * 4);
    _tile_loadd(2, c + kTile * stride, stride * 4);
    _tile_loadd(3, c + kTile * stride + kTile, stride * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t p = 0; p < k; p += kTile, a += 2 * block, b += kTile * cols) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, cols * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile, cols * 4);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + block, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, stride * 4);
  _tile_stored(1, c + kTile, stride * 4);
  _tile_stored(2, c + kTile * stride, stride * 4);
  _tile_stored(3, c + kTile * stride + kTile, stride * 4);
  asm volatile("" ::: "memory");
}
#endif

// Products of two bfloat16 are exact in float32, so pairs and tiles give what converted numbers would, but for the order of sums,
// and denormals, which count as zero.
Kernel choose(bool pairs) {
  const Isa best = isa();
#ifdef GPTVQ_AMX
  if (pairs && best == Isa::avx512 && forced() != "avx512" && has_tiles(Tiles::bfloat16))
    return {"amx", 2 * kTile, 2 * kTile, tile_amx, Packing::tiles, begin_tiles, end_tiles};
#endif
#ifdef GPTVQ_BFLOAT16
  if (pairs && best == Isa::avx512 && __builtin_cpu_supports("avx512bf16")) return {"avx512bf16", 8, 48, tile_pairs, Packing::pairs};
#endif
  (void)pairs;
  if (best == Isa::avx512) return {"avx512", 8, 48, tile_8x48};
  if (best == Isa::avx2) return {"avx2", 6, 16, tile_6x16};
  return {"portable", 4, 8, tile_4x8};
}

// The system is asked for tiles when they are needed, and once.
const Kernel& kernel(bool pairs) {
  static const Kernel plain = choose(false);
  if (!pairs) return plain;
  static const Kernel best = choose(true);
  return best;
}

GPTVQ_INLINE float value(float v) { return v; }
GPTVQ_INLINE float value(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

// `count` lines (rows of A or columns of B), `line` apart, `step` from one k to the next -> to [k][width], times sign.
template <class T>
void pack(const T* from, int64_t line, int64_t step, int64_t count, int64_t k, int64_t width, float sign, float* to) {
  if (count < width) std::fill_n(to, k * width, 0.f);
  if (line == 1) {
    for (int64_t p = 0; p < k; ++p)
      for (int64_t i = 0; i < count; ++i) to[p * width + i] = sign * value(from[p * step + i]);
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t p = 0; p < k; ++p) to[p * width + i] = sign * value(from[i * line + p * step]);
  }
}

void pack(const Matrix& from, int64_t offset, int64_t line, int64_t step, int64_t count, int64_t k, int64_t width, float sign, float* to) {
  if (from.bfloat16)
    pack(static_cast<const std::uint16_t*>(from.data) + offset, line, step, count, k, width, sign, to);
  else
    pack(static_cast<const float*>(from.data) + offset, line, step, count, k, width, sign, to);
}

// The same with two steps of k side by side; a step too few is zero.
void pack_pairs(const Matrix& from, int64_t offset, int64_t line, int64_t step, int64_t count, int64_t k, int64_t width, float* to) {
  const auto* x = static_cast<const std::uint16_t*>(from.data) + offset;
  std::uint32_t pairs[48] = {};
  for (int64_t p = 0; p < k; p += 2, x += 2 * step, to += width) {
    for (int64_t i = 0; i < count; ++i) pairs[i] = x[i * line];
    if (p + 1 < k)
      for (int64_t i = 0; i < count; ++i) pairs[i] |= static_cast<std::uint32_t>(x[step + i * line]) << 16;
    std::memcpy(to, pairs, static_cast<std::size_t>(width) * sizeof(float));
  }
}

// Pairs for tiles: [k / 16][width][16], zeros past the last step.
void pack_tiles(const Matrix& from, int64_t offset, int64_t line, int64_t step, int64_t count, int64_t k, int64_t width, float* to) {
  const auto* x = static_cast<const std::uint16_t*>(from.data) + offset;
  const int64_t pairs = (k + 1) / 2;
  std::memset(to, 0, static_cast<std::size_t>((pairs + kTile - 1) / kTile * kTile * width) * sizeof(float));
  for (int64_t p = 0; p < pairs; ++p, x += 2 * step)
    for (int64_t i = 0; i < count; ++i) {
      std::uint32_t pair = x[i * line];
      if (2 * p + 1 < k) pair |= static_cast<std::uint32_t>(x[step + i * line]) << 16;
      std::memcpy(to + (p / kTile * width + i) * kTile + p % kTile, &pair, sizeof pair);
    }
}

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// The products of rows [row, end) with the panel of columns from `col` on.
void chunk(const Kernel& kernel, const Product& p, const float* left, const float* right, float* C, int64_t stride, int64_t row,
           int64_t end, int64_t col) {
  alignas(64) float edge[2 * kTile * 2 * kTile];       // of the largest tile
  const int64_t width = std::min(kernel.cols, p.n - col);
  if (kernel.begin) kernel.begin();
  for (int64_t depth = 0; depth < p.k; depth += kDepth) {
    const int64_t steps = std::min(kDepth, p.k - depth);
    const bool add = p.add || depth > 0;
    for (int64_t i = row; i < end && !(p.upper && i >= col + width); i += kernel.rows) {
      const float* a = left + i * p.k + depth * kernel.rows;
      const float* b = right + depth * kernel.cols;
      const int64_t height = std::min(kernel.rows, p.m - i);
      float* c = C + i * stride + col;
      if (height == kernel.rows && width == kernel.cols) {
        kernel.tile(a, b, c, stride, steps, add);
        continue;
      }
      kernel.tile(a, b, edge, kernel.cols, steps, false);
      for (int64_t r = 0; r < height; ++r)
        for (int64_t j = 0; j < width; ++j) c[r * stride + j] = edge[r * kernel.cols + j] + (add ? c[r * stride + j] : 0.f);
    }
  }
  if (kernel.end) kernel.end();
}

}  // namespace

const char* product_instructions(bool bfloat16) { return kernel(bfloat16).name; }

void matmul(const Product& whole, const Matrix& A, const Matrix& B, float* C, int64_t stride, int threads) {
  const Kernel& kernel = gptvq::kernel(A.bfloat16 && B.bfloat16 && whole.sign == 1.f);
  const int64_t row_panels = parts(whole.m, kernel.rows), col_panels = parts(whole.n, kernel.cols);
  const int64_t chunks = parts(whole.m, kChunk), deepest = kernel.depth(std::min(whole.k, kMost));
  const Aligned<float> left(row_panels * kernel.rows * deepest), right(col_panels * kernel.cols * deepest);
  for (int64_t first = 0; first < whole.k; first += kMost) {
    const int64_t steps = std::min(kMost, whole.k - first);
    Product p = whole;
    p.k = kernel.depth(steps);
    p.add = whole.add || first > 0;
    const auto packed = [&](const Matrix& from, int64_t offset, int64_t line, int64_t step, int64_t count, int64_t width, float sign,
                            bool rows, float* to) {
      if (kernel.packing == Packing::numbers) {
        pack(from, offset, line, step, count, steps, width, sign, to);
      } else if (kernel.packing == Packing::tiles && rows) {
        pack_tiles(from, offset, line, step, count, steps, width, to);
      } else {
        pack_pairs(from, offset, line, step, count, steps, width, to);
        std::fill(to + parts(steps, 2) * width, to + p.k * width, 0.f);
      }
    };
    parallel_for(row_panels + col_panels, threads, [&](int64_t panel) {
      const int64_t row = panel * kernel.rows, col = (panel - row_panels) * kernel.cols;
      if (panel < row_panels)
        packed(A, row * A.row + first * A.col, A.row, A.col, std::min(kernel.rows, p.m - row), kernel.rows, p.sign, true,
               left.data() + row * p.k);
      else
        packed(B, col * B.col + first * B.row, B.col, B.row, std::min(kernel.cols, p.n - col), kernel.cols, 1.f, false,
               right.data() + col * p.k);
    });
    parallel_for(chunks * col_panels, threads, [&](int64_t part) {
      const int64_t row = part / col_panels * kChunk, col = part % col_panels * kernel.cols;
      chunk(kernel, p, left.data(), right.data() + col * p.k, C, stride, row, std::min(p.m, row + kChunk), col);
    });
  }
}

}  // namespace gptvq
