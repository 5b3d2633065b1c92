// Vectors of AVX-512 with VBMI, VNNI and GFNI: a slab is a whole tile, a lookup in up to 64 entries one vpermb.  Included after
// linear_kernel.h.
#pragma once
#include "cpu/linear_x86.h"

namespace {

// Offset: whether weights are unsigned, stored + 128, as vpdpbusd wants them.
template <bool Offset>
struct Avx512 {
  static constexpr int rows = 16, tokens = 2, chains = 8;
  static constexpr int wide_slabs = 2, wide_tokens = 6;     // 24 sums, 2 weights, 1 activation
  static constexpr bool offset = Offset;
  static constexpr bool finds_256 = true, nibbles = true;
  using Bytes = __m512i;
  using Index = __m512i;
  using Weights = __m512i;
  using Activation = int8_t;
  using Ints = __m512i;
  using Floats = __m512;
  using Four = __m512i;

  static GPTVQ_INLINE Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  template <int N>
  static GPTVQ_INLINE Bytes down(Bytes v) { return N ? _mm512_srli_epi16(v, N) : v; }
  template <int Mask>
  static GPTVQ_INLINE Bytes pick(Bytes where_set, Bytes elsewhere) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(Mask), where_set, elsewhere, 0xca);
  }
  static GPTVQ_INLINE __m512i biased(__m512i table) { return Offset ? _mm512_xor_si512(table, _mm512_set1_epi8(-128)) : table; }

  // One codebook of up to 64 entries, repeated to 64: the bits above a code's do not matter.
  template <int K, bool One>
  struct Table {
    __m512i entries;

    GPTVQ_INLINE void load(const int8_t* p) {
      if constexpr (K == 64) {
        entries = biased(_mm512_loadu_si512(p));
      } else if constexpr (K == 16) {
        entries = biased(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
      } else {
        long long eight = 0;
        memcpy(&eight, p, K);
        entries = biased(K == 8 ? _mm512_set1_epi64(eight) : _mm512_set1_epi32(static_cast<int>(eight)));
      }
    }
    GPTVQ_INLINE Index index(Bytes code) const { return code; }
    template <int Half>
    GPTVQ_INLINE Index nibble(Bytes codes) const { return down<4 * Half>(codes); }
    GPTVQ_INLINE Bytes find(Index at) const { return _mm512_permutexvar_epi8(at, entries); }
  };

  template <bool One>
  struct Table<256, One> {
    __m512i entries[4];

    GPTVQ_INLINE void load(const int8_t* p) {
      for (int i = 0; i < 4; ++i) entries[i] = biased(_mm512_loadu_si512(p + 64 * i));
    }
    GPTVQ_INLINE Index index(Bytes code) const { return code; }
    GPTVQ_INLINE Bytes find(Index at) const {
      const __mmask64 upper = _mm512_movepi8_mask(at);
      return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(entries[0], at, entries[1]),
                                    _mm512_permutex2var_epi8(entries[2], at, entries[3]));
    }
  };

  // 16 entries per four rows.
  template <int K>
  struct Table<K, false> {
    __m512i entries, offsets;

    // In registers all the way: what was just stored in pieces cannot be loaded as one without waiting for the stores.
    GPTVQ_INLINE void load(const int8_t* const* book, int64_t at, const uint8_t* lane_offset) {
      __m512i all = _mm512_castsi128_si512(four_rows<K>(book, at));
      all = _mm512_inserti32x4(all, four_rows<K>(book + 16 / K, at), 1);
      all = _mm512_inserti32x4(all, four_rows<K>(book + 2 * (16 / K), at), 2);
      entries = biased(_mm512_inserti32x4(all, four_rows<K>(book + 3 * (16 / K), at), 3));
      offsets = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lane_offset)));
    }
    GPTVQ_INLINE Index index(Bytes code) const { return _mm512_ternarylogic_epi32(code, _mm512_set1_epi8(K - 1), offsets, 0xea); }
    // As `index`, of the codes in the low or high half of each byte: the product with a matrix of bits moves bits 4 to 7 down and
    // clears the rest in one instruction.  With 16 entries four rows share one codebook, and need no offsets.
    template <int Half>
    GPTVQ_INLINE Index nibble(Bytes codes) const {
      static_assert(K == 16);
      if constexpr (Half) return _mm512_gf2p8affine_epi64_epi8(codes, _mm512_set1_epi64(0x1020408000000000), 0);
      else return _mm512_and_si512(codes, _mm512_set1_epi8(15));
    }
    GPTVQ_INLINE Bytes find(Index at) const { return _mm512_shuffle_epi8(entries, at); }
  };

  // Negated where byte I of a row's four has bit Bit + j, for its j-th weight: 256 - w, with and without the offset.
  template <int Bit, int I, class Table>
  static GPTVQ_INLINE Weights with_signs(const Table& table, Index at, Bytes signs) {
    const __m512i of_row = _mm512_shuffle_epi8(signs, _mm512_add_epi8(_mm512_set1_epi8(I), _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0)));
    const __mmask64 negative = _mm512_test_epi8_mask(of_row, _mm512_set1_epi32(static_cast<int>(0x08040201u << Bit)));
    const Weights w = table.find(at);
    return _mm512_mask_sub_epi8(w, negative, _mm512_setzero_si512(), w);
  }

  static GPTVQ_INLINE Ints whole(int32_t v) { return _mm512_set1_epi32(v); }
  static GPTVQ_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static GPTVQ_INLINE Four four(const int8_t* x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
  }
  static GPTVQ_INLINE void dot(Ints& sum, Bytes weights, Four x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));      // GCC 12 copies the sums around the intrinsic
  }
  static GPTVQ_INLINE void dot(Ints& sum, Bytes weights, const int8_t* x) {
    using Word __attribute__((may_alias, aligned(1))) = int32_t;
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const Word*>(x)));
  }
  static GPTVQ_INLINE Floats real(Ints v) { return _mm512_cvtepi32_ps(v); }
  static GPTVQ_INLINE Floats full(float v) { return _mm512_set1_ps(v); }
  static GPTVQ_INLINE Floats floats(const float* p) { return _mm512_load_ps(p); }
  static GPTVQ_INLINE void put(float* p, Floats v) { _mm512_store_ps(p, v); }
  static GPTVQ_INLINE void put(uint8_t* p, Bytes v) { _mm512_store_si512(p, v); }
  static GPTVQ_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static GPTVQ_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  template <bool One>
  static GPTVQ_INLINE Floats group_scale(const LinearArgs& a, int64_t row, int64_t strip) {
    const uint16_t* gs = a.gs + (row / 16 * a.strips + strip) * a.groups_per_tile;
    if constexpr (One) return _mm512_castsi512_ps(_mm512_set1_epi32(*gs << 16));
    const __m512i of_row = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a.row_group)));
    const __m512i all = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(gs)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_permutexvar_epi32(of_row, all), 16));
  }

  static GPTVQ_INLINE Floats block_scale(const uint8_t* pair, const LinearSpan& span, const float* table) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pair)));
    const __m512i code = _mm512_srlv_epi32(both, _mm512_set1_epi32(static_cast<int>(span.shift)));       // in the low 4 bits
    return _mm512_permutexvar_ps(code, _mm512_loadu_ps(table));
  }

  static GPTVQ_INLINE __mmask16 mask(int64_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

  // y [at..] = v, as y's type.
  static GPTVQ_INLINE void put(const LinearArgs& a, int64_t at, __mmask16 mask, Floats v) {
    if (a.type == 0) {
      _mm512_mask_storeu_ps(static_cast<float*>(a.y) + at, mask, v);
    } else if (a.type == 1) {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.y) + at, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      const __m512i bits = _mm512_castps_si512(v);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
      rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.y) + at, mask, _mm512_cvtepi32_epi16(rounded));
    }
  }

  static GPTVQ_INLINE void store(const LinearArgs& a, int64_t row, int64_t token, Floats v) {
    if (a.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask(a.rows - row), a.bias + row));
    put(a, token * a.y_stride + row, mask(a.rows - row), v);
  }

  static GPTVQ_INLINE uint32_t peak(const float* x, int64_t count) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16) {
      const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff));
      most = _mm512_max_epu32(most, bits);
    }
    return _mm512_reduce_max_epu32(most);
  }

  template <int Dim, int Planes>
  static GPTVQ_INLINE void sixteen(const float* x, float inverse, bool finite, int8_t* hi, int8_t* lo, Ints* sums) {
    const __m128i order = Dim == 1   ? _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                          : Dim == 2 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                     : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512 scaled = _mm512_maskz_mul_ps(finite ? 0xffff : 0, _mm512_loadu_ps(x), _mm512_set1_ps(inverse));
    const auto put = [&](int8_t* to, __m512i v) __attribute__((always_inline)) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(v), order));
    };
    if constexpr (Planes == 1) {
      const __m512i v = _mm512_cvtps_epi32(scaled);
      put(hi, v);
      sums[0] = add(sums[0], v);
    } else {
      const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(whole, _mm512_set1_ps(1.f / 254.f)));
      const __m512i low = _mm512_cvtps_epi32(_mm512_fnmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(254.f), whole));
      put(hi, high);
      put(lo, low);
      sums[0] = add(sums[0], high);
      sums[1] = add(sums[1], low);
    }
  }
  static GPTVQ_INLINE int32_t sum_of(Ints v) { return _mm512_reduce_add_epi32(v); }
};

}  // namespace
