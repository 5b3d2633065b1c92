// y = W x on packed weights: the control flow that all instruction sets share.  Included once by each linear_<isa>.cpp, in an
// unnamed namespace and with C headers only, so that no function compiled for one set can be linked into another's code.
//
// A lane of 32 bits is one output row.  A slab is V::rows rows of a tile: 4 bytes of a plane per row are four
// consecutive codes, a quad.  Looking a quad up in the table of dimension i gives the int8 weights of 4 columns per row,
// which one dot instruction multiplies with 4 activation bytes:
//
//   plane   row 0: c0 c1 c2 c3 | row 1: c0 c1 c2 c3 | ...        codes of quad q
//   lookup  row 0: w w w w     | row 1: w w w w     | ...        weights of columns (4 q + 0..3) d + i
//   dot     row 0: += w . x    | row 1: += w . x    | ...        x: 4 bytes, stored in that order, the same for all rows
//
// Activations are integers: x = step * (254 hi + lo) with int8 hi and lo (a16), or step * hi (a8), one step per span of columns.
// Sets without a dot product of bytes have V::Activation = int16_t, and 254 hi + lo as one number.  Sums over a span are exact in
// int32, as spans have at most 256 columns; spans are added up in float32.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/linear_args.h"

#define GPTVQ_INLINE inline __attribute__((always_inline))
#define GPTVQ_UNROLL _Pragma("GCC unroll 32")

namespace {

using gptvq::LinearArgs;
using gptvq::LinearKernel;
using gptvq::LinearSpan;

}  // namespace

#include "cpu/linear_portable.h"

namespace {

template <int N>
struct Number {
  static constexpr int value = N;
};

// f(Number<First>{}), ..., f(Number<Last - 1>{}).
template <int First, int Last, class F>
GPTVQ_INLINE void for_each(F&& f) {
  if constexpr (First < Last) {
    f(Number<First>{});
    for_each<First + 1, Last>(f);
  }
}

template <int Bits, int Dim>
struct Codes {
  static constexpr bool has_signs = Bits > 8;
  static constexpr int bits = Bits, dim = Dim, k = 1 << (has_signs ? 8 : Bits);
  static constexpr int quads = 8 / Dim, planes = Bits / Dim, bytes = planes * 64;

  // The codes of quad Q in the low bits of each byte, with rubbish above them.  Layout: cpu/layout.h.
  template <class V, int Q>
  static GPTVQ_INLINE typename V::Bytes quad(const typename V::Bytes* p) {
    if constexpr (Bits == 2) return V::template down<2 * (Q % 4)>(p[Q / 4]);
    else if constexpr (Bits == 4) return V::template down<4 * (Q % 2)>(p[Q / 2]);
    else if constexpr (Bits >= 8) return p[Q];
    else if constexpr (Bits == 3 && Q < 6) return V::template down<3 * (Q % 2)>(p[Q / 2]);
    else if constexpr (Bits == 3) return V::template pick<4>(V::template down<Q - 2>(p[2]), V::template down<6>(p[Q - 6]));
    else if constexpr (Q < 3) return p[Q];
    else
      return V::template pick<0x30>(V::template down<2>(p[0]),
                                    V::template pick<0x0c>(V::template down<4>(p[1]), V::template down<6>(p[2])));
  }
};

// The weights of dimension I of quad Q.
template <class V, class C, int Q, int I, class Table>
GPTVQ_INLINE typename V::Weights weights_of(const Table& table, const typename V::Index& index, const typename V::Bytes* planes) {
  if constexpr (C::has_signs) return V::template with_signs<4 * Q, I>(table, index, planes[2]);
  else return table.find(index);
}

// The tables of a slab.  One: its rows share a codebook.  Otherwise every four rows have 16 table entries of their own: 16 / K
// slots of K, so that four rows can belong to as many groups.
template <class V, class C, bool One>
struct Books {
  static constexpr int kSlots = One ? 1 : 16 / C::k * (V::rows / 4);
  typename V::template Table<C::k, One> table[C::dim];
  const int8_t* book[kSlots];           // of strip 0

  GPTVQ_INLINE void start(const LinearArgs& a, int64_t row) {
    const int64_t stride = a.strips * C::dim * C::k;
    if constexpr (One) {
      book[0] = a.cb + row / a.group_rows * stride;
    } else {
      const int64_t first = row / 16 * 16 / a.group_rows, last = a.row_groups - 1;
      for (int s = 0; s < kSlots; ++s) {
        const int64_t group = first + a.slot_group[static_cast<int>(row % 16 / 4) * (16 / C::k) + s];
        book[s] = a.cb + (group < last ? group : last) * stride;      // rows past the layer's last repeat its group
      }
    }
  }

  GPTVQ_INLINE void load(const LinearArgs& a, int64_t strip) {
    GPTVQ_UNROLL for (int i = 0; i < C::dim; ++i) {
      const int64_t at = (strip * C::dim + i) * C::k;
      if constexpr (One) table[i].load(book[0] + at);
      else table[i].load(book, at, a.lane_offset);
    }
  }
};

template <class V, int Chains>
GPTVQ_INLINE typename V::Floats total(const typename V::Ints* chain) {
  typename V::Ints sum = chain[0];
  GPTVQ_UNROLL for (int c = 1; c < Chains; ++c) sum = V::add(sum, chain[c]);
  return V::real(sum);
}

// The block scales of a slab's rows.
struct BlockScales {
  const float* table;
  int64_t tile;                 // bytes
  const uint8_t* codes;

  GPTVQ_INLINE BlockScales(const LinearArgs& a, int64_t row)
      : table(a.scale_table), tile((a.scale_blocks + 1) / 2 * 16), codes(a.sc + row / 16 * tile + row % 16) {}

  // In the columns of a span.
  template <class V>
  GPTVQ_INLINE typename V::Floats of(const LinearSpan& span) const {
    const uint8_t* pair = codes + span.codes;
    __builtin_prefetch(pair + tile);
    return V::block_scale(pair, span, table + span.table);
  }
};

template <class V>
GPTVQ_INLINE typename V::Floats scales_of(const LinearArgs& a, int64_t row, const LinearSpan& span) {
  return BlockScales(a, row).template of<V>(span);
}

// Where the weights of quad Q lie in a table.
template <class V, class C, int Q, class Table>
GPTVQ_INLINE typename V::Index index_of(const Table& table, const typename V::Bytes* planes) {
  if constexpr (V::nibbles && C::bits == 4) return table.template nibble<Q % 2>(planes[Q / 2]);
  else return table.index(C::template quad<V, Q>(planes));
}

// Bytes between what is read and what is asked for.  The processor's own guesses end with a page, and memory answers after
// thousands of cycles' worth of bytes.  The first cache waits for few lines at once: memory fills the second one, far ahead, and
// that the first one, shortly before.
constexpr int64_t kFarAhead = 16384, kAhead = 2048;

// Asks for the tables of the tile after `row`'s: these arrays are read a few bytes at a time, which the processor does not foresee.
template <class C>
GPTVQ_INLINE void ask_for_next_tile(const LinearArgs& a, const int8_t* next_books, int64_t row, int64_t strip) {
  constexpr int kBytes = C::dim * C::k;
  for (int64_t g = 0; g < a.groups_per_tile; ++g)
    GPTVQ_UNROLL for (int at = 0; at < kBytes; at += 64) __builtin_prefetch(next_books + (g * a.strips + strip) * kBytes + at);
  __builtin_prefetch(a.gs + ((row / 16 + 1) * a.strips + strip) * a.groups_per_tile);
}

// y of a slab's rows from `row` on and Tokens tokens from `token` on.  One stream of indices at a time keeps the memory busiest.
// Chains: independent sums per token and plane.  Halves: block scales change in the middle of a block of 32 columns, which is then
// two spans.
template <class V, class C, bool One, int Planes, bool Halves, int Tokens, int Chains>
GPTVQ_INLINE void slab(const LinearArgs& a, int64_t row, int64_t token) {
  using Ints = typename V::Ints;
  using Floats = typename V::Floats;
  using Activation = typename V::Activation;
  constexpr int kParts = Halves ? 2 : 1, kQuads = C::quads / kParts;
  const uint8_t* from = a.idx + row / 16 * a.blocks * C::bytes + row % 16 * 4;
  const int64_t line = a.blocks * 32;
  const Activation* x[Tokens][Planes];
  GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t)
    GPTVQ_UNROLL for (int p = 0; p < Planes; ++p) x[t][p] = reinterpret_cast<const Activation*>(p ? a.lo : a.hi) + (token + t) * line;
  const LinearSpan* span = a.span + token * a.spans;

  const BlockScales block_scales(a, row);
  const bool scaled = a.sc;
  Books<V, C, One> books;
  books.start(a, row);
  const int8_t* next_books = a.cb + (row / 16 + 1) * 16 / a.group_rows * a.strips * C::dim * C::k;
  Floats sum[Tokens];
  GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t) sum[t] = V::full(0.f);
  for (int64_t strip = 0, left = a.blocks; strip < a.strips; ++strip, left -= a.strip_blocks) {
    ask_for_next_tile<C>(a, next_books, row, strip);
    books.load(a, strip);
    Floats of_strip[Tokens];
    GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t) of_strip[t] = V::full(0.f);
    for (int64_t in_strip = left < a.strip_blocks ? left : a.strip_blocks; in_strip > 0; in_strip -= a.span_blocks) {
      for_each<0, kParts>([&](auto part) __attribute__((always_inline)) {
        Ints acc[Tokens][Planes][Chains];
        GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t) {
          GPTVQ_UNROLL for (int p = 0; p < Planes; ++p)
            GPTVQ_UNROLL for (int c = 0; c < Chains; ++c) acc[t][p][c] = V::whole(0);
          if constexpr (V::offset) {
            acc[t][0][0] = V::whole(span[t * a.spans].hi_sum);
            if constexpr (Planes == 2) acc[t][1][0] = V::whole(span[t * a.spans].lo_sum);
          }
        }
        const auto add_block = [&]() __attribute__((always_inline)) {
          // GCC 12 keeps each distance between two of them in a register of its own otherwise.
          GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t)
            GPTVQ_UNROLL for (int p = 0; p < Planes; ++p) asm("" : "+r"(x[t][p]));
          typename V::Bytes planes[C::planes];
          GPTVQ_UNROLL for (int p = 0; p < C::planes; ++p) {
            planes[p] = V::load(from + 64 * p);
            __builtin_prefetch(from + 64 * p + kFarAhead, 0, 2);
            __builtin_prefetch(from + 64 * p + kAhead);
          }
          for_each<0, kQuads>([&](auto number) __attribute__((always_inline)) {
            constexpr int Q = decltype(number)::value + kQuads * decltype(part)::value;
            const typename V::Index index = index_of<V, C, Q>(books.table[0], planes);
            for_each<0, C::dim>([&](auto dimension) __attribute__((always_inline)) {
              constexpr int i = decltype(dimension)::value;
              const typename V::Weights w = weights_of<V, C, Q, i>(books.table[i], index, planes);
              GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t)
                GPTVQ_UNROLL for (int p = 0; p < Planes; ++p)
                  V::dot(acc[t][p][(Q * C::dim + i) % Chains], w, x[t][p] + (Q * C::dim + i) * 4);
            });
          });
          if constexpr (decltype(part)::value == kParts - 1) {
            from += C::bytes;
            GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t)
              GPTVQ_UNROLL for (int p = 0; p < Planes; ++p) x[t][p] += 32;
          }
        };
        int64_t blocks = in_strip < a.span_blocks ? in_strip : a.span_blocks;
        if (C::bits == 4 && blocks == 2) {        // as with scales for 64 columns: no loop, in which GCC 12 moves sums about
          add_block();
          add_block();
        } else {
          do add_block();
          while (--blocks);
        }
        Floats scale;
        if (scaled) scale = block_scales.template of<V>(*span);
        GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t) {
          Floats found = total<V, Chains>(acc[t][0]);
          if constexpr (Planes == 2) found = V::fma(found, V::full(254.f), total<V, Chains>(acc[t][1]));
          const Floats step = V::full(span[t * a.spans].step);
          of_strip[t] = scaled ? V::fma(V::mul(found, step), scale, of_strip[t]) : V::fma(found, step, of_strip[t]);
        }
        ++span;
      });
    }
    const Floats group_scale = V::template group_scale<One>(a, row, strip);
    GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t) sum[t] = V::fma(of_strip[t], group_scale, sum[t]);
  }
  GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t) V::store(a, row, token + t, sum[t]);
}

template <class V, class C, bool One, int Planes, bool Halves, int Tokens>
void some_tokens(const LinearArgs& a, int64_t first, int64_t last, int64_t token) {
  constexpr int kBusy = Tokens * Planes;                    // enough sums under way to hide the latency of the dot; long look-ups do, too
  constexpr int kChains = kBusy >= V::chains || C::k == 256 ? 1 : kBusy * 2 >= V::chains ? 2 : 4;
  for (int64_t row = first * 16; row < last * 16; row += V::rows) slab<V, C, One, Planes, Halves, Tokens, kChains>(a, row, token);
}

}  // namespace

#include "cpu/linear_wide.h"

namespace {

template <class V, class C, bool One, int Planes, bool Halves>
void tiles(const LinearArgs& a, int64_t first, int64_t last, float* sums) {
  if constexpr (V::wide_tokens > 0)
    if (a.tokens > V::tokens) return Many<V>::template tiles<C, One, Planes, Halves>(a, first, last, sums);
  if constexpr (V::tokens > 0) {
    int64_t token = 0;
    if constexpr (!Halves && V::tokens >= 4)
      for (; token + 4 <= a.tokens; token += 4) some_tokens<V, C, One, Planes, Halves, 4>(a, first, last, token);
    if constexpr (!Halves && V::tokens >= 2)
      for (; token + 2 <= a.tokens; token += 2) some_tokens<V, C, One, Planes, Halves, 2>(a, first, last, token);
    for (; token < a.tokens; ++token) some_tokens<V, C, One, Planes, Halves, 1>(a, first, last, token);
  }
}

constexpr float kTiny = 1e-30f;     // of a span: less than this counts as zero, lest 1 / step overflow

// Activations to integers.  A span with a NaN or infinity gets the step NaN, so that the outputs are NaN.
template <class V, int Dim, int Planes, bool Halves>
void quantize(const LinearArgs& a, const float* x, int64_t token) {
  constexpr float kLimit = Planes == 2 ? 127.f * 254.f + 126.f : 127.f;
  using Activation = typename V::Activation;
  Activation* hi = reinterpret_cast<Activation*>(a.hi) + token * a.blocks * 32;
  Activation* lo = reinterpret_cast<Activation*>(a.lo) + token * a.blocks * 32;
  LinearSpan* span = a.span + token * a.spans;
  [[maybe_unused]] const Many<V> many(a, token, Planes);
  int64_t scale_block = 0, scale_end = a.scale_block;
  for (int64_t strip = 0, b = 0; strip < a.strips; ++strip) {
    const int64_t strip_end = b + a.strip_blocks < a.blocks ? b + a.strip_blocks : a.blocks;
    while (b < strip_end) {
      const int64_t span_end = b + a.span_blocks < strip_end ? b + a.span_blocks : strip_end;
      constexpr int kParts = Halves ? 2 : 1;
      for (int part = 0; part < kParts; ++part, ++span) {
        const int64_t from = 32 * b + 16 * part, to = Halves ? from + 16 : 32 * span_end;
        const uint32_t peak_bits = V::peak(x + from, to - from);    // of |x|: NaN > infinity > finite
        float peak;
        memcpy(&peak, &peak_bits, 4);
        const bool finite = peak_bits < 0x7f800000u, zero = peak < kTiny;
        const float inverse = finite && !zero ? kLimit / peak : 0.f;
        typename V::Ints sums[2] = {V::whole(0), V::whole(0)};
        for (int64_t c = from; c < to; c += 16) {
          if constexpr (V::wide_tokens > 0)
            if (a.tokens > V::tokens) {
              alignas(16) int8_t planes[2][16];
              V::template sixteen<Dim, Planes>(x + c, inverse, finite, planes[0], planes[1], sums);
              many.template put<Planes>(planes, c);
              continue;
            }
          V::template sixteen<Dim, Planes>(x + c, inverse, finite, hi + c, lo + c, sums);
        }
        // The next block's scale or the same one, without a division; past the columns activations are 0.
        if (a.sc && from >= scale_end && scale_block + 1 < a.scale_blocks) ++scale_block, scale_end += a.scale_block;
        const int64_t pair = scale_block / 2 * 16;
        *span = {!finite ? NAN : zero ? 0.f : peak / kLimit, 0, 0, static_cast<int32_t>(pair), scale_block % 2 * 4, scale_block * 16};
        if constexpr (V::wide_tokens > 0)
          if (a.tokens > V::tokens) a.step[(span - a.span - token * a.spans) * a.tokens + token] = span->step;
        if constexpr (V::offset) span->hi_sum = -128 * V::sum_of(sums[0]);
        if constexpr (V::offset && Planes == 2) span->lo_sum = -128 * V::sum_of(sums[1]);
      }
      b = span_end;
    }
  }
}

template <class V, class C, int Planes>
LinearKernel kernel_of(bool one_book, bool halves) {
  constexpr int D = C::dim, kStored = sizeof(typename V::Activation) == 1 ? Planes : 1;
  if (one_book || C::k > 16)
    return halves ? LinearKernel{tiles<V, C, true, kStored, true>, quantize<V, D, Planes, true>}
                  : LinearKernel{tiles<V, C, true, kStored, false>, quantize<V, D, Planes, false>};
  if constexpr (C::k <= 16)
    return halves ? LinearKernel{tiles<V, C, false, kStored, true>, quantize<V, D, Planes, true>}
                  : LinearKernel{tiles<V, C, false, kStored, false>, quantize<V, D, Planes, false>};
}

// of(Codes<code_bits, dim>{}), or Result{} for an unknown format.
template <class Result, class Of>
Result with_codes(int code_bits, int dim, const Of& of) {
  switch (10 * dim + code_bits) {
    case 12: return of(Codes<2, 1>{});
    case 13: return of(Codes<3, 1>{});
    case 14: return of(Codes<4, 1>{});
    case 24: return of(Codes<4, 2>{});
    case 26: return of(Codes<6, 2>{});
    case 28: return of(Codes<8, 2>{});
    case 48: return of(Codes<8, 4>{});
    case 52: return of(Codes<12, 4>{});
  }
  return Result{};
}

// The kernels on the instruction set V, or nulls for an unknown format.
template <class V>
LinearKernel kernels(int code_bits, int dim, int planes, bool one_book, bool halves) {
  return with_codes<LinearKernel>(code_bits, dim, [&](auto codes) -> LinearKernel {
    using C = decltype(codes);
    if constexpr (C::k == 256 && !V::finds_256) return {};
    else return planes == 2 ? kernel_of<V, C, 2>(one_book, halves) : kernel_of<V, C, 1>(one_book, halves);
  });
}

}  // namespace
