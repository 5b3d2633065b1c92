// AVX2 with 256 centroids: looking a vector up in memory, as one number of dim bytes, beats the 16 vpshufb that each of its weights
// would take.  So here a register holds 16 neighbouring weights of one row, and sums run along rows.  Included by linear_avx2.cpp.
#pragma once

namespace {

// One codebook, the vectors of C::dim bytes side by side.
template <class C>
struct Vectors {
  static constexpr int kBytes = C::dim * C::k;
  alignas(32) int8_t entries[kBytes];

  GPTVQ_INLINE void load(const int8_t* planar) {
    const auto at = [&](int i, int k) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planar + i * C::k + k)); };
    const auto put = [&](int byte, __m256i v) { _mm256_store_si256(reinterpret_cast<__m256i*>(entries + byte), v); };
    // The halves of a register of 32 entries go to where they belong by 16 entries each.
    for (int k = 0; k < C::k; k += 32) {
      const __m256i low = _mm256_unpacklo_epi8(at(0, k), at(1, k)), high = _mm256_unpackhi_epi8(at(0, k), at(1, k));
      if constexpr (C::dim == 2) {
        put(2 * k, _mm256_permute2x128_si256(low, high, 0x20));
        put(2 * k + 32, _mm256_permute2x128_si256(low, high, 0x31));
      } else {
        const __m256i low_2 = _mm256_unpacklo_epi8(at(2, k), at(3, k)), high_2 = _mm256_unpackhi_epi8(at(2, k), at(3, k));
        const __m256i a = _mm256_unpacklo_epi16(low, low_2), b = _mm256_unpackhi_epi16(low, low_2);
        const __m256i c = _mm256_unpacklo_epi16(high, high_2), d = _mm256_unpackhi_epi16(high, high_2);
        put(4 * k, _mm256_permute2x128_si256(a, b, 0x20));
        put(4 * k + 32, _mm256_permute2x128_si256(c, d, 0x20));
        put(4 * k + 64, _mm256_permute2x128_si256(a, b, 0x31));
        put(4 * k + 96, _mm256_permute2x128_si256(c, d, 0x31));
      }
    }
  }

  // The four weights from `codes` on, as a number: a vector of four, or two of two.
  GPTVQ_INLINE int32_t four(const uint8_t* codes) const {
    const auto at = [&](int i) { return entries + C::dim * static_cast<size_t>(codes[i]); };
    if constexpr (C::dim == 4) {
      int32_t vector;
      memcpy(&vector, at(0), 4);
      return vector;
    } else {
      uint16_t first, second;
      memcpy(&first, at(0), 2);
      memcpy(&second, at(1), 2);
      return static_cast<int32_t>(first | static_cast<uint32_t>(second) << 16);
    }
  }

  // Weights 16 Half .. 16 Half + 15 of a row in a block of 32 columns; `planes` points at its first byte.
  template <int Half>
  GPTVQ_INLINE __m256i sixteen(const uint8_t* planes) const {
    __m128i w;
    if constexpr (C::dim == 4) {
      const uint8_t* codes = planes + 64 * Half;
      w = _mm_setr_epi32(four(codes), four(codes + 1), four(codes + 2), four(codes + 3));
    } else {
      const uint8_t* codes = planes + 128 * Half;
      w = _mm_setr_epi32(four(codes), four(codes + 2), four(codes + 64), four(codes + 66));
    }
    if constexpr (C::has_signs) {           // byte i of the third plane: bit j is the sign of weight 4 j + i
      int32_t signs;
      memcpy(&signs, planes + 128, 4);
      const __m128i bits = _mm_slli_epi16(_mm_setr_epi32(0x01010101, 0x02020202, 0x04040404, 0x08080808), 4 * Half);
      const __m128i negative = _mm_cmpeq_epi8(_mm_and_si128(_mm_set1_epi32(signs), bits), bits);
      w = _mm_sub_epi8(_mm_xor_si128(w, negative), negative);
    }
    return _mm256_cvtepi8_epi16(w);
  }
};

GPTVQ_INLINE float total_of(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// y of a tile's rows, from `row` on, and Tokens tokens from `token` on.  Activations are in the order of the columns.
template <class C, bool Halves, int Tokens>
void tile_by_rows(const LinearArgs& a, int64_t row, int64_t token) {
  constexpr int kRows = Tokens == 4 ? 2 : 4;                // at a time: their sums stay in registers
  const uint8_t* from = a.idx + row / 16 * a.blocks * C::bytes;
  const int64_t line = a.blocks * 32;
  const int16_t* x = reinterpret_cast<const int16_t*>(a.hi) + token * line;
  const LinearSpan* span = a.span + token * a.spans;
  const int8_t* books = a.cb + row / a.group_rows * a.strips * C::dim * C::k;
  __m256 sums[Tokens][16];
  for (int t = 0; t < Tokens; ++t)
    for (int r = 0; r < 16; ++r) sums[t][r] = _mm256_setzero_ps();
  Vectors<C> book;
  for (int64_t strip = 0, left = a.blocks; strip < a.strips; ++strip, left -= a.strip_blocks) {
    book.load(books + strip * C::dim * C::k);
    const Avx2::Floats group_scale = Avx2::group_scale<true>(a, row, strip);
    for (int64_t in_strip = left < a.strip_blocks ? left : a.strip_blocks; in_strip > 0; in_strip -= a.span_blocks) {
      const int64_t blocks = in_strip < a.span_blocks ? in_strip : a.span_blocks;
      for_each<0, Halves ? 2 : 1>([&](auto part) __attribute__((always_inline)) {
        constexpr int kPart = decltype(part)::value;
        const Avx2::Floats scales = a.sc ? Avx2::mul(group_scale, scales_of<Avx2>(a, row, *span)) : group_scale;
        alignas(32) float scale[16];
        for (int h = 0; h < 2; ++h) _mm256_store_ps(scale + 8 * h, scales.v[h]);
        for (int r = 0; r < 16; r += kRows) {
          __m256i acc[kRows][Tokens];
          GPTVQ_UNROLL for (int k = 0; k < kRows; ++k)
            GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t) acc[k][t] = _mm256_setzero_si256();
          for (int64_t b = 0; b < blocks; ++b)
            for_each<Halves ? kPart : 0, Halves ? kPart + 1 : 2>([&](auto half) __attribute__((always_inline)) {
              constexpr int kHalf = decltype(half)::value;
              __m256i of_token[Tokens];
              GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t)
                of_token[t] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + t * line + 32 * b + 16 * kHalf));
              GPTVQ_UNROLL for (int k = 0; k < kRows; ++k) {
                const __m256i w = book.template sixteen<kHalf>(from + b * C::bytes + 4 * (r + k));
                GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t) acc[k][t] = _mm256_add_epi32(acc[k][t], _mm256_madd_epi16(w, of_token[t]));
              }
            });
          GPTVQ_UNROLL for (int k = 0; k < kRows; ++k)
            GPTVQ_UNROLL for (int t = 0; t < Tokens; ++t) {
              const __m256 factor = _mm256_set1_ps(scale[r + k] * span[t * a.spans].step);
              sums[t][r + k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[k][t]), factor, sums[t][r + k]);
            }
        }
        ++span;
      });
      from += blocks * C::bytes;
      x += 32 * blocks;
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    alignas(32) float y[16];
    for (int r = 0; r < 16; ++r) y[r] = total_of(sums[t][r]);
    Avx2::store(a, row, token + t, Avx2::floats(y));
  }
}

template <class C, bool Halves>
void tiles_by_rows(const LinearArgs& a, int64_t first, int64_t last, float*) {
  for (int64_t row = 16 * first; row < 16 * last; row += 16) {
    int64_t token = 0;
    for (; token + 4 <= a.tokens; token += 4) tile_by_rows<C, Halves, 4>(a, row, token);
    for (; token + 2 <= a.tokens; token += 2) tile_by_rows<C, Halves, 2>(a, row, token);
    for (; token < a.tokens; ++token) tile_by_rows<C, Halves, 1>(a, row, token);
  }
}

template <class C>
LinearKernel by_rows(int planes, bool halves) {
  const auto tiles = halves ? tiles_by_rows<C, true> : tiles_by_rows<C, false>;
  if (planes == 2) return {tiles, halves ? quantize<Avx2, 0, 2, true> : quantize<Avx2, 0, 2, false>};
  return {tiles, halves ? quantize<Avx2, 0, 1, true> : quantize<Avx2, 0, 1, false>};
}

}  // namespace
