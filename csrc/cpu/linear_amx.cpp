// Several tokens on processors with AMX: one instruction multiplies up to 16 tokens with the weights of 16 rows in up to 64
// columns.  Few tokens are left to linear_avx512.cpp.
//
// Its factors are tiles of 16 lines of 64 bytes.  What look_up() writes, 4 columns of 16 rows in a line, is the second factor as it
// is; activations lie in teams of up to 16 tokens, as first factors: [teams][steps][planes][tokens][columns of a step].
#include "cpu/linear_kernel.h"

#if defined(GPTVQ_AMX)
#include "cpu/linear_avx512.h"

namespace {

struct Amx : Avx512<false> {
  static constexpr int tokens = 0;      // all are left to Many<Amx>, and what Avx512 says of many tokens does not count
};

constexpr int64_t kLines = 16, kSlabs = 2, kSlabBytes = kChunk * 32 * kLines;
constexpr int64_t kCached = 768 << 10;      // bytes of activations that all rows pass by before the next ones come

// How activations are cut; the same for all layers that share them.
struct Teams {
  int64_t tokens;       // of a team; the last may have fewer, the others' places are read, but what comes of them is not
  int64_t count;
  int64_t step_bits;    // a step has 1 << step_bits columns; no span ends within one but the layer's last
  int64_t steps;        // the last one's columns past the layer's are zero

  explicit Teams(const LinearArgs& a) {
    count = (a.tokens + kLines - 1) / kLines;
    tokens = (a.tokens + count - 1) / count;
    step_bits = a.scale_block == 16 ? 4 : a.span_blocks == 1 || (a.strips > 1 && a.strip_blocks % 2) ? 5 : 6;
    steps = steps_of(32 * a.blocks);
  }
  int64_t steps_of(int64_t cols) const { return (cols + (1 << step_bits) - 1) >> step_bits; }
  int64_t tile_bytes() const { return tokens << step_bits; }
};

// Sums of the first plane and of the second, two slabs each; first factors of the planes; second factors of the slabs.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t lines[16] = {};

  explicit TileShapes(const Teams& teams) {
    for (int i = 0; i < 8; ++i) {
      bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 1 << teams.step_bits : 64);
      lines[i] = static_cast<uint8_t>(i < 6 ? teams.tokens : (1 << teams.step_bits) / 4);
    }
  }
};

// Tiles 0 to 3 = the products of `steps` steps.  Tiles are named by literal numbers; the compiler does not know what their
// instructions read and write.
template <int Planes>
GPTVQ_INLINE void multiply(const Teams& teams, const int8_t* x, const uint8_t* weights, int64_t steps) {
  const int64_t line = int64_t{1} << teams.step_bits, tile = teams.tile_bytes();
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Planes == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; ++i, x += Planes * tile, weights += line * kLines) {
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, weights + kSlabBytes, 64);
    _tile_loadd(4, x, line);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (Planes == 2) {
      _tile_loadd(5, x + tile, line);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
}

// found [planes][slabs][16 tokens][16 rows] = tiles 0 to 3.
template <int Planes>
GPTVQ_INLINE void store(int32_t* found) {
  asm volatile("" ::: "memory");
  _tile_stored(0, found, 64);
  _tile_stored(1, found + 256, 64);
  if constexpr (Planes == 2) {
    _tile_stored(2, found + 512, 64);
    _tile_stored(3, found + 768, 64);
  }
  asm volatile("" ::: "memory");
}

// Products of a team and a span that are yet to be added to the sums [tokens][slabs][rows].
struct Pending {
  alignas(64) int32_t found[4 * 256];
  int64_t tokens = 0;
  const float *steps, *scales;
  float* sums;

  template <int Planes>
  GPTVQ_INLINE void add() {
    using V = Amx;
    const V::Floats scale[kSlabs] = {V::floats(scales), V::floats(scales + 16)};
    for (int64_t t = 0; t < tokens; ++t) {
      const V::Floats step = V::full(steps[t]);
      GPTVQ_UNROLL for (int s = 0; s < kSlabs; ++s) {
        const int32_t* of = found + s * 256 + 16 * t;
        V::Floats sum = V::real(_mm512_load_si512(of));
        if constexpr (Planes == 2) sum = V::fma(sum, V::full(254.f), V::real(_mm512_load_si512(of + 512)));
        float* to = sums + (t * kSlabs + s) * 16;
        V::put(to, V::fma(V::mul(sum, step), scale[s], V::floats(to)));
      }
    }
    tokens = 0;
  }
};

template <>
struct Many<Amx> {
  using V = Amx;
  const Teams teams;
  const bool odd;             // half of the last step lies past the layer
  const int64_t last;         // 16 columns of the layer
  int8_t* const team;

  Many(const LinearArgs& a, int64_t token, int planes)
      : teams(a), odd(teams.step_bits == 6 && a.blocks % 2), last(32 * a.blocks - 16),
        team(a.hi + token / teams.tokens * teams.steps * planes * teams.tile_bytes() + (token % teams.tokens << teams.step_bits)) {}

  template <int Planes>
  GPTVQ_INLINE void put(const int8_t (*planes)[16], int64_t col) const {
    const int64_t step = col >> teams.step_bits, tile = teams.tile_bytes();
    for (int p = 0; p < Planes; ++p) {
      int8_t* to = team + (step * Planes + p) * tile + (col - (step << teams.step_bits));
      memcpy(to, planes[p], 16);
      if (odd && col == last) memset(to + 16, 0, 32);
    }
  }

  template <class C, bool One, int Planes, bool Halves>
  static void tiles(const LinearArgs& a, int64_t first, int64_t last, float* sums) {
    const Teams teams(a);
    const TileShapes shapes(teams);
    asm volatile("" : : "r"(&shapes) : "memory");      // the compiler thinks that only the first bytes are read
    _tile_loadconfig(&shapes);
    const int64_t most = kCached / (teams.steps * Planes * teams.tile_bytes()) + 1;
    for (int64_t from = 0; from < teams.count; from += most)
      for (int64_t row = 16 * first; row < 16 * last; row += 16 * kSlabs)
        slabs<C, One, Planes, Halves>(a, teams, from, from + most < teams.count ? from + most : teams.count, row, 16 * last, sums);
    _tile_release();
  }

  // y of the teams [first, last) and two slabs from `row` on; a slab past the last tile repeats the first and is not stored.
  template <class C, bool One, int Planes, bool Halves>
  static void slabs(const LinearArgs& a, const Teams& teams, int64_t first, int64_t last, int64_t row, int64_t rows_end, float* sums) {
    alignas(64) uint8_t weights[kSlabs * kSlabBytes];
    alignas(64) float scales[2 * kChunk][kSlabs * 16];
    const int64_t rows[kSlabs] = {row, row + 16 < rows_end ? row + 16 : row};
    const int64_t tokens_end = last * teams.tokens < a.tokens ? last * teams.tokens : a.tokens;
    memset(sums + first * teams.tokens * kSlabs * 16, 0, static_cast<size_t>((tokens_end - first * teams.tokens) * kSlabs * 16) * sizeof(float));
    const int64_t width = Halves ? 16 : 32 * a.span_blocks, tile = Planes * teams.tile_bytes();
    Pending pending;
    pending.scales = scales[0];     // add() reads them even where nothing is pending
    const LinearSpan* span = a.span;
    for_each_chunk(a, [&](int64_t strip, int64_t b, int64_t chunk_end) __attribute__((always_inline)) {
      const int64_t spans = Halves ? 2 * (chunk_end - b) : (chunk_end - b + a.span_blocks - 1) / a.span_blocks;
      for (int s = 0; s < kSlabs; ++s) {
        look_up<V, C, One>(a, rows[s], strip, b, chunk_end, weights + s * kSlabBytes);
        const V::Floats group_scale = V::group_scale<One>(a, rows[s], strip);
        for (int64_t i = 0; i < spans; ++i)
          V::put(scales[i] + 16 * s, a.sc ? V::mul(group_scale, scales_of<V>(a, rows[s], span[i])) : group_scale);
      }
      // A span's products are added while the next one's are under way.
      for (int64_t team = first; team < last; ++team) {
        const int64_t token = team * teams.tokens, left = a.tokens - token;
        const int8_t* x = a.hi + (team * teams.steps + (32 * b >> teams.step_bits)) * tile;
        for (int64_t i = 0, at = 0; i < spans; ++i, at += width) {
          const int64_t cols = 32 * (chunk_end - b) - at;
          multiply<Planes>(teams, x + (at >> teams.step_bits) * tile, weights + at * 16, teams.steps_of(cols < width ? cols : width));
          pending.add<Planes>();
          store<Planes>(pending.found);
          pending.tokens = left < teams.tokens ? left : teams.tokens;
          pending.steps = a.step + (span + i - a.span) * a.tokens + token;
          pending.scales = scales[i];
          pending.sums = sums + token * kSlabs * 16;
        }
      }
      pending.add<Planes>();
      span += spans;
    });
    for (int64_t t = first * teams.tokens; t < tokens_end; ++t)
      for (int s = 0; s < kSlabs && row + 16 * s < rows_end; ++s) V::store(a, rows[s], t, V::floats(sums + (t * kSlabs + s) * 16));
  }
};

}  // namespace

namespace gptvq {

LinearKernel linear_amx(int code_bits, int dim, int planes, bool one_book, bool halves) {
  return kernels<Amx>(code_bits, dim, planes, one_book, halves);
}

}  // namespace gptvq
#endif
