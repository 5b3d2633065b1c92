// The linear kernels for many tokens: a chunk of weights is looked up once into a buffer that stays in the first cache, and
// multiplied with the activations of all tokens.  For sets with V::wide_tokens; included by linear_kernel.h.
#pragma once

namespace {

constexpr int kChunk = 8;       // blocks of 32 columns; a multiple of every span

// Activations lie in teams of this many tokens (the last one smaller), in the order in which they are read:
// [teams][dots][tokens][planes][4 bytes].
template <class V, int Planes>
constexpr int team_size = Planes == 2 ? V::wide_tokens : 2 * V::wide_tokens;

// The weights of blocks [first, last) of a slab -> out [blocks][8 dots][4 bytes a row].
template <class V, class C, bool One>
void look_up(const LinearArgs& a, int64_t row, int64_t strip, int64_t first, int64_t last, uint8_t* out) {
  Books<V, C, One> books;
  books.start(a, row);
  books.load(a, strip);
  const uint8_t* from = a.idx + (row / 16 * a.blocks + first) * C::bytes + row % 16 * 4;
  for (int64_t b = first; b < last; ++b, from += C::bytes, out += 32 * V::rows) {
    typename V::Bytes planes[C::planes];
    GPTVQ_UNROLL for (int p = 0; p < C::planes; ++p) {
      planes[p] = V::load(from + 64 * p);
      __builtin_prefetch(from + 64 * p + kAhead);
    }
    for_each<0, C::quads>([&](auto number) __attribute__((always_inline)) {
      constexpr int Q = decltype(number)::value;
      const typename V::Index index = index_of<V, C, Q>(books.table[0], planes);
      for_each<0, C::dim>([&](auto dimension) __attribute__((always_inline)) {
        constexpr int i = decltype(dimension)::value;
        V::put(out + (Q * C::dim + i) * 4 * V::rows, weights_of<V, C, Q, i>(books.table[i], index, planes));
      });
    });
  }
}

// Calls f(strip, first block, last block) chunk by chunk; none reaches over the end of a strip.
template <class F>
GPTVQ_INLINE void for_each_chunk(const LinearArgs& a, const F& f) {
  for (int64_t strip = 0, b = 0; strip < a.strips; ++strip) {
    const int64_t strip_end = b + a.strip_blocks < a.blocks ? b + a.strip_blocks : a.blocks;
    for (int64_t chunk_end; b < strip_end; b = chunk_end) {
      chunk_end = b + kChunk < strip_end ? b + kChunk : strip_end;
      f(strip, b, chunk_end);
    }
  }
}

// Adds one span to the sums [Tokens][slabs][rows] of a team: `dots` dots of looked-up weights, whose slabs lie `apart` bytes from
// each other, against its activations x [dots][Tokens][Planes][4].  The sums must stay in registers: hence no loops but for_each.
template <class V, int Planes, int Tokens>
void add_span(const LinearArgs& a, const uint8_t* weights, int64_t apart, int64_t dots, const int8_t* x, const LinearSpan* span,
              const float* scales, float* sums) {
  constexpr int kSlabs = V::wide_slabs, kSums = Tokens * Planes;
  typename V::Ints acc[kSlabs][kSums];
  for_each<0, kSums>([&](auto n) __attribute__((always_inline)) {
    constexpr int t = decltype(n)::value / Planes, p = decltype(n)::value % Planes;
    const typename V::Ints from = V::whole(!V::offset ? 0 : p ? span[t * a.spans].lo_sum : span[t * a.spans].hi_sum);
    for_each<0, kSlabs>([&](auto s) __attribute__((always_inline)) { acc[decltype(s)::value][t * Planes + p] = from; });
  });
  for (int64_t d = 0; d < dots; ++d, weights += 4 * V::rows, x += 4 * kSums) {
    typename V::Weights w[kSlabs];
    for_each<0, kSlabs>([&](auto s) __attribute__((always_inline)) { w[decltype(s)::value] = V::load(weights + decltype(s)::value * apart); });
    for_each<0, kSums>([&](auto n) __attribute__((always_inline)) {
      const typename V::Four four = V::four(x + 4 * decltype(n)::value);
      for_each<0, kSlabs>([&](auto s) __attribute__((always_inline)) {
        V::dot(acc[decltype(s)::value][decltype(n)::value], w[decltype(s)::value], four);
      });
    });
  }
  for_each<0, Tokens * kSlabs>([&](auto n) __attribute__((always_inline)) {
    constexpr int t = decltype(n)::value / kSlabs, s = decltype(n)::value % kSlabs;
    typename V::Floats found = V::real(acc[s][t * Planes]);
    if constexpr (Planes == 2) found = V::fma(found, V::full(254.f), V::real(acc[s][t * Planes + 1]));
    found = V::mul(found, V::full(span[t * a.spans].step));
    float* to = sums + (t * kSlabs + s) * V::rows;
    V::put(to, V::fma(found, V::floats(scales + s * V::rows), V::floats(to)));
  });
}

// The same for all teams from `token` on: Tokens each, and a last smaller one.  `span`: that of the first token of all.
template <class V, int Planes, int Tokens>
void add_span_to_all(const LinearArgs& a, const uint8_t* weights, int64_t apart, int64_t dots, int64_t col, const LinearSpan* span,
                     int64_t token, const float* scales, float* sums) {
  for (; token + Tokens <= a.tokens; token += Tokens)
    add_span<V, Planes, Tokens>(a, weights, apart, dots, a.hi + (token * a.blocks * 32 + Tokens * col) * Planes,
                                span + token * a.spans, scales, sums + token * V::wide_slabs * V::rows);
  if constexpr (Tokens > 1)
    if (token < a.tokens) add_span_to_all<V, Planes, Tokens - 1>(a, weights, apart, dots, col, span, token, scales, sums);
}

// y of all tokens and V::wide_slabs slabs from `row` on; slabs past the last tile repeat the first and are not stored.
template <class V, class C, bool One, int Planes, bool Halves>
void many_tokens(const LinearArgs& a, int64_t row, int64_t rows_end, float* sums) {
  constexpr int kSlabs = V::wide_slabs;
  constexpr int64_t kApart = kChunk * 32 * V::rows;
  alignas(64) uint8_t weights[kSlabs * kApart];
  alignas(64) float scales[kSlabs * V::rows];
  int64_t rows[kSlabs];
  for (int s = 0; s < kSlabs; ++s) rows[s] = row + s * V::rows < rows_end ? row + s * V::rows : row;
  memset(sums, 0, static_cast<size_t>(a.tokens * kSlabs * V::rows) * sizeof(float));
  const LinearSpan* span = a.span;
  for_each_chunk(a, [&](int64_t strip, int64_t chunk, int64_t chunk_end) __attribute__((always_inline)) {
    typename V::Floats group_scale[kSlabs];
    for (int s = 0; s < kSlabs; ++s) {
      look_up<V, C, One>(a, rows[s], strip, chunk, chunk_end, weights + s * kApart);
      group_scale[s] = V::template group_scale<One>(a, rows[s], strip);
    }
    for (int64_t span_end, b = chunk; b < chunk_end; b = span_end) {
      span_end = b + a.span_blocks < chunk_end ? b + a.span_blocks : chunk_end;
      for (int part = 0; part < (Halves ? 2 : 1); ++part, ++span) {
        const int64_t col = 32 * b + 16 * part, dots = Halves ? 4 : 8 * (span_end - b);
        for (int s = 0; s < kSlabs; ++s)
          V::put(scales + s * V::rows, a.sc ? V::mul(group_scale[s], scales_of<V>(a, rows[s], *span)) : group_scale[s]);
        add_span_to_all<V, Planes, team_size<V, Planes>>(a, weights + (col - 32 * chunk) * V::rows, kApart, dots, col, span, 0, scales,
                                                         sums);
      }
    }
  });
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int s = 0; s < kSlabs && row + s * V::rows < rows_end; ++s)
      V::store(a, rows[s], t, V::floats(sums + (t * kSlabs + s) * V::rows));
}

// What a set does with more than V::tokens tokens.
template <class V>
struct Many {
  const LinearArgs& a;
  const int64_t token;

  Many(const LinearArgs& args, int64_t its_token, int) : a(args), token(its_token) {}

  // Puts 16 columns of the token, from `col` on, into its team.
  template <int Planes>
  GPTVQ_INLINE void put(const int8_t (*planes)[16], int64_t col) const {
    constexpr int64_t kTeam = team_size<V, Planes>;
    const int64_t first = token / kTeam * kTeam, team = first + kTeam < a.tokens ? kTeam : a.tokens - first;
    int8_t* out = a.hi + (first * a.blocks * 32 + team * col + (token - first) * 4) * Planes;
    for (int d = 0; d < 4; ++d)
      for (int p = 0; p < Planes; ++p) memcpy(out + (d * team * Planes + p) * 4, planes[p] + 4 * d, 4);
  }

  // y of the tiles [first, last).
  template <class C, bool One, int Planes, bool Halves>
  static void tiles(const LinearArgs& a, int64_t first, int64_t last, float* sums) {
    for (int64_t row = 16 * first; row < 16 * last; row += V::wide_slabs * V::rows)
      many_tokens<V, C, One, Planes, Halves>(a, row, 16 * last, sums);
  }
};

}  // namespace
