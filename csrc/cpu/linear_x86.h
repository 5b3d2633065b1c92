// What the two x86 sets share.  Included like linear_kernel.h.
#pragma once
#include <immintrin.h>

namespace {

// The 16 table entries of four rows: K of each of 16 / K books, from their offset `at` on.
template <int K>
GPTVQ_INLINE __m128i four_rows(const int8_t* const* book, int64_t at) {
  if constexpr (K == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(book[0] + at));
  else if constexpr (K == 8)
    return _mm_unpacklo_epi64(_mm_loadu_si64(book[0] + at), _mm_loadu_si64(book[1] + at));
  else
    return _mm_unpacklo_epi64(_mm_unpacklo_epi32(_mm_loadu_si32(book[0] + at), _mm_loadu_si32(book[1] + at)),
                              _mm_unpacklo_epi32(_mm_loadu_si32(book[2] + at), _mm_loadu_si32(book[3] + at)));
}

}  // namespace
