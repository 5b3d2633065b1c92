// The weights themselves, by the look-ups of linear_wide.h on AVX-512.  Included after linear_avx512.h.
#pragma once

namespace {

// w [16] of 4 bytes of 16 rows each -> of each row its 64 bytes.
GPTVQ_INLINE void transpose(__m512i* w) {
  __m512i t[16];
  GPTVQ_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  }
  GPTVQ_UNROLL for (int i = 0; i < 16; i += 4)
    GPTVQ_UNROLL for (int j = 0; j < 2; ++j) {
      w[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      w[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  // Now quarter l of w[4 g + r] is a part of row 4 l + r.
  GPTVQ_UNROLL for (int r = 0; r < 4; ++r) {
    t[r] = _mm512_shuffle_i32x4(w[r], w[4 + r], 0x44);
    t[4 + r] = _mm512_shuffle_i32x4(w[8 + r], w[12 + r], 0x44);
    t[8 + r] = _mm512_shuffle_i32x4(w[r], w[4 + r], 0xee);
    t[12 + r] = _mm512_shuffle_i32x4(w[8 + r], w[12 + r], 0xee);
  }
  GPTVQ_UNROLL for (int r = 0; r < 4; ++r) {
    w[r] = _mm512_shuffle_i32x4(t[r], t[4 + r], 0x88);
    w[4 + r] = _mm512_shuffle_i32x4(t[r], t[4 + r], 0xdd);
    w[8 + r] = _mm512_shuffle_i32x4(t[8 + r], t[12 + r], 0x88);
    w[12 + r] = _mm512_shuffle_i32x4(t[8 + r], t[12 + r], 0xdd);
  }
}

// Where the weight of each of 64 columns lies among a row's looked-up bytes.
template <int Dim>
GPTVQ_INLINE __m512i column_order() {
  alignas(64) int8_t from[64];
  for (int col = 0; col < 64; ++col) {
    const int vector = col % 32 / Dim;
    from[col] = static_cast<int8_t>(col / 32 * 32 + (vector / 4 * Dim + col % Dim) * 4 + vector % 4);
  }
  return _mm512_load_si512(from);
}

// y [rows from 16 first on, y_stride columns] of the tiles [first, last), y_stride being the layer's columns.
template <class C, bool One>
void unpack_tiles(const LinearArgs& a, int64_t first, int64_t last) {
  using V = Avx512<false>;
  alignas(64) uint8_t found[kChunk * 32 * 16];
  alignas(64) float group_scale[16], scales[4][16];
  const __m512i order = column_order<C::dim>();
  for (int64_t row = 16 * first; row < 16 * last; row += 16) {
    const int64_t rows = a.rows - row < 16 ? a.rows - row : 16;
    for_each_chunk(a, [&](int64_t strip, int64_t b, int64_t chunk_end) __attribute__((always_inline)) {
      V::put(group_scale, V::group_scale<One>(a, row, strip));
      look_up<V, C, One>(a, row, strip, b, chunk_end, found);
      for (int64_t pair = b; pair < chunk_end; pair += 2) {
        const int64_t col = 32 * pair, end = 32 * chunk_end < a.y_stride ? 32 * chunk_end : a.y_stride;
        __m512i w[16];        // of an odd last block half is what lay there before, and no column of it is stored
        GPTVQ_UNROLL for (int i = 0; i < 16; ++i) w[i] = V::load(found + (col - 32 * b) * 16 + 64 * i);
        transpose(w);
        if (a.sc)
          for (int64_t q = 0; q < 4 && col + 16 * q < end; ++q) {
            const int64_t block = (col + 16 * q) / a.scale_block;
            const LinearSpan span = {0, 0, 0, static_cast<int32_t>(block / 2 * 16), block % 2 * 4, block * 16};
            V::put(scales[q], scales_of<V>(a, row, span));
          }
        for (int64_t r = 0; r < rows; ++r) {
          alignas(64) int8_t all[64];
          _mm512_store_si512(all, _mm512_permutexvar_epi8(order, w[r]));
          const V::Floats scale = V::full(group_scale[r]);
          for (int q = 0; q < 4 && col + 16 * q < end; ++q) {
            const int64_t at = col + 16 * q;
            V::Floats v = V::mul(V::real(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(all + 16 * q)))), scale);
            if (a.sc) v = V::mul(v, V::full(scales[q][r]));
            V::put(a, (row - 16 * first + r) * a.y_stride + at, V::mask(end - at), v);
          }
        }
      }
    });
  }
}

}  // namespace
