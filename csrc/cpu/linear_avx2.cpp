// AVX2 and FMA, Haswell and later: a tile is two registers, a lookup in 16 entries one vpshufb.  There is no dot product of bytes but
// for vpmaddubsw, which saturates; that of 16-bit numbers takes both planes of an activation at once.  256 centroids: linear_avx2_rows.h.
#include "cpu/linear_kernel.h"

#if defined(__x86_64__) && defined(__AVX2__) && defined(__FMA__)
#include "cpu/linear_x86.h"

namespace {

struct Avx2 {
  static constexpr int rows = 16, tokens = 4, wide_tokens = 0, chains = 1;
  static constexpr bool offset = true;                      // unsigned bytes are cheaper to widen
  static constexpr bool finds_256 = false, nibbles = false;
  struct Bytes { __m256i v[2]; };                           // rows 0..7, rows 8..15
  struct Weights { __m256i even[2], odd[2]; };              // of each row's four, 16 bits each
  struct Ints { __m256i v[2]; };
  struct Floats { __m256 v[2]; };
  struct Four { __m256i even, odd; };
  using Index = Bytes;
  using Activation = int16_t;

  static GPTVQ_INLINE __m256i twice(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static GPTVQ_INLINE Bytes load(const uint8_t* p) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
  }
  template <int N>
  static GPTVQ_INLINE Bytes down(Bytes b) {
    return N ? Bytes{_mm256_srli_epi16(b.v[0], N), _mm256_srli_epi16(b.v[1], N)} : b;
  }
  template <int Mask>
  static GPTVQ_INLINE Bytes pick(Bytes where_set, Bytes elsewhere) {
    const __m256i mask = _mm256_set1_epi8(Mask);
    for (int h = 0; h < 2; ++h)
      where_set.v[h] = _mm256_or_si256(_mm256_and_si256(mask, where_set.v[h]), _mm256_andnot_si256(mask, elsewhere.v[h]));
    return where_set;
  }
  static GPTVQ_INLINE Bytes masked(Bytes b, char mask) {
    return {_mm256_and_si256(b.v[0], _mm256_set1_epi8(mask)), _mm256_and_si256(b.v[1], _mm256_set1_epi8(mask))};
  }
  static GPTVQ_INLINE __m256i biased(__m256i table) { return _mm256_xor_si256(table, _mm256_set1_epi8(-128)); }
  static GPTVQ_INLINE Weights widened(Bytes b) {
    const __m256i low = _mm256_set1_epi16(255);
    return {{_mm256_and_si256(b.v[0], low), _mm256_and_si256(b.v[1], low)}, {_mm256_srli_epi16(b.v[0], 8), _mm256_srli_epi16(b.v[1], 8)}};
  }

  // One codebook.  vpshufb gives 0 for an index with its top bit set, so with 16 entries a register, each the XOR of its own and
  // the register's before, the XOR over all registers with the index lowered by 16 each time is the entry looked for.
  template <int K, bool One>
  struct Table {
    static constexpr int kRegisters = K > 16 ? K / 16 : 1;
    __m256i entries[kRegisters];

    GPTVQ_INLINE void load(const int8_t* p) {
      if constexpr (K < 16) {
        int8_t repeated[16];
        for (int i = 0; i < 16; i += K) memcpy(repeated + i, p, K);
        entries[0] = biased(twice(repeated));
      } else {
        for (int i = 0; i < kRegisters; ++i)
          entries[i] = i ? _mm256_xor_si256(twice(p + 16 * i), twice(p + 16 * i - 16)) : biased(twice(p + 16 * i));
      }
    }
    GPTVQ_INLINE Index index(Bytes code) const { return masked(code, K > 16 ? K - 1 : 15); }
    GPTVQ_INLINE Weights find(Index at) const {
      Bytes found;
      for (int h = 0; h < 2; ++h) found.v[h] = _mm256_shuffle_epi8(entries[0], at.v[h]);
      GPTVQ_UNROLL for (int i = 1; i < kRegisters; ++i)
        for (int h = 0; h < 2; ++h) {
          at.v[h] = _mm256_sub_epi8(at.v[h], _mm256_set1_epi8(16));
          found.v[h] = _mm256_xor_si256(found.v[h], _mm256_shuffle_epi8(entries[i], at.v[h]));
        }
      return widened(found);
    }
  };

  // 16 entries per four rows.
  template <int K>
  struct Table<K, false> {
    Bytes entries;
    __m256i offsets;

    GPTVQ_INLINE void load(const int8_t* const* book, int64_t at, const uint8_t* lane_offset) {
      constexpr int kSlots = 16 / K;
      for (int h = 0; h < 2; ++h)
        entries.v[h] = biased(_mm256_set_m128i(four_rows<K>(book + (2 * h + 1) * kSlots, at), four_rows<K>(book + 2 * h * kSlots, at)));
      offsets = twice(lane_offset);
    }
    GPTVQ_INLINE Index index(Bytes code) const {
      code = masked(code, K - 1);
      return {_mm256_or_si256(code.v[0], offsets), _mm256_or_si256(code.v[1], offsets)};
    }
    GPTVQ_INLINE Weights find(Index at) const {
      return widened({_mm256_shuffle_epi8(entries.v[0], at.v[0]), _mm256_shuffle_epi8(entries.v[1], at.v[1])});
    }
  };

  static GPTVQ_INLINE Ints whole(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static GPTVQ_INLINE Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}; }
  static GPTVQ_INLINE Four four(const int16_t* x) {
    int32_t words[2];
    memcpy(words, x, sizeof words);
    return {_mm256_set1_epi32(words[0]), _mm256_set1_epi32(words[1])};
  }
  static GPTVQ_INLINE void dot(Ints& sum, const Weights& w, const Activation* columns) {
    const Four x = four(columns);
    for (int h = 0; h < 2; ++h) {
      const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(w.even[h], x.even), _mm256_madd_epi16(w.odd[h], x.odd));
      sum.v[h] = _mm256_add_epi32(sum.v[h], products);
    }
  }
  static GPTVQ_INLINE Floats real(Ints a) { return {_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}; }
  static GPTVQ_INLINE Floats full(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static GPTVQ_INLINE Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}; }
  static GPTVQ_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])};
  }
  static GPTVQ_INLINE Floats floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

  template <bool One>
  static GPTVQ_INLINE Floats group_scale(const LinearArgs& a, int64_t row, int64_t strip) {
    if constexpr (One) return full(from_bits(static_cast<uint32_t>(a.gs[row / 16 * a.strips + strip]) << 16));
    return portable_group_scale<Avx2>(a, row, strip);
  }

  static GPTVQ_INLINE Floats block_scale(const uint8_t* pair, const LinearSpan& span, const float* table) {
    // vpermps reads the low 3 bits alone, the blend the top one.
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    Floats scale;
    for (int h = 0; h < 2; ++h) {
      const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pair + 8 * h)));
      const __m256i code = _mm256_srl_epi32(both, _mm_loadu_si64(&span.shift));
      scale.v[h] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    }
    return scale;
  }

  static GPTVQ_INLINE void store(const LinearArgs& a, int64_t row, int64_t token, Floats v) {
    float values[rows];
    memcpy(values, &v, sizeof values);
    portable_store(a, row, token, values, rows);
  }

  static GPTVQ_INLINE uint32_t peak(const float* x, int64_t count) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 8) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    alignas(32) uint32_t each[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), most);
    uint32_t all = 0;
    for (const uint32_t one : each) all = one > all ? one : all;
    return all;
  }

  // The four of a quad in the order 0, 2, 1, 3: those of even bytes, then those of odd ones.  Dim 0: as they are.
  template <int Dim, int Planes>
  static GPTVQ_INLINE void sixteen(const float* x, float inverse, bool finite, int16_t* to, int16_t*, Ints* sums) {
    const __m128i order = Dim == 0   ? _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                          : Dim == 1 ? _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15)
                          : Dim == 2 ? _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, 2, 3, 10, 11, 6, 7, 14, 15)
                                     : _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256 keep = _mm256_castsi256_ps(_mm256_set1_epi32(finite ? -1 : 0));
    __m128i eight[2];
    for (int i = 0; i < 2; ++i) {
      const __m256 scaled = _mm256_and_ps(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse)), keep);
      const __m256i whole = _mm256_cvtps_epi32(scaled);
      eight[i] = _mm_shuffle_epi8(_mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)), order);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), Dim == 4 ? _mm_unpacklo_epi16(eight[0], eight[1]) : eight[0]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), Dim == 4 ? _mm_unpackhi_epi16(eight[0], eight[1]) : eight[1]);
    const __m128i one = _mm_set1_epi16(1);
    const __m128i sum = _mm_add_epi32(_mm_madd_epi16(eight[0], one), _mm_madd_epi16(eight[1], one));
    sums[0].v[0] = _mm256_add_epi32(sums[0].v[0], _mm256_zextsi128_si256(sum));
  }
  static GPTVQ_INLINE int32_t sum_of(const Ints& sums) {          // of what `sixteen` adds to
    __m128i sum = _mm256_castsi256_si128(sums.v[0]);
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 1);
  }
};

}  // namespace

#include "cpu/linear_avx2_rows.h"

namespace gptvq {

LinearKernel linear_avx2(int code_bits, int dim, int planes, bool one_book, bool halves) {
  if (code_bits == 12) return by_rows<Codes<12, 4>>(planes, halves);
  if (code_bits == 8) return dim == 2 ? by_rows<Codes<8, 2>>(planes, halves) : by_rows<Codes<8, 4>>(planes, halves);
  return kernels<Avx2>(code_bits, dim, planes, one_book, halves);
}

}  // namespace gptvq
#endif
