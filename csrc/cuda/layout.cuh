// The packed index layout (cpu/layout.h has the picture) as a thread of a GPU reads and writes it.
//
// `row` points at the word of plane 0 that belongs to a row of a block; the row's other words follow 16 words apart.
#pragma once
#include "cpu/layout.h"
#include "cuda/vector.cuh"

namespace gptvq {

template <int Bits, int Dim>
struct DeviceLayout {
  using Code = typename Format<Bits, Dim>::Code;
  static constexpr bool has_signs = Format<Bits, Dim>::has_signs;
  static constexpr int codewords = Format<Bits, Dim>::codewords, vectors = 32 / Dim, quads = vectors / 4, planes = vectors * Bits / 32;
  static constexpr int block_bytes = 64 * planes, plane_words = 16;

  static __device__ __forceinline__ constexpr std::uint32_t each(std::uint32_t byte) { return byte * 0x01010101u; }

  // The row's word of signs: bit 8 i + v is that of dimension i of vector v.
  static __device__ __forceinline__ std::uint32_t signs(const std::uint32_t* row) { return row[2 * plane_words]; }
  // From such a word the 4 signs of a vector, one beside the other, and back: by a product that moves each bit to a place of its own.
  static __device__ __forceinline__ std::uint32_t gather_signs(std::uint32_t word, int v) {
    return (word >> v & each(1)) * 0x10204080u >> 28;
  }
  static __device__ __forceinline__ std::uint32_t spread_signs(std::uint32_t of, int v) { return (of * 0x00204081u & each(1)) << v; }

  // Codes of vectors 4 q .. 4 q + 3 of the block without their signs, a byte each, all below `codewords`.
  static __device__ __forceinline__ std::uint32_t quad(const std::uint32_t* row, int q) {
    if constexpr (Bits >= 8) {
      return row[plane_words * q];
    } else if constexpr (Bits == 6) {
      if (q < 3) return row[plane_words * q] & each(63);
      return (row[0] >> 6 & each(3)) << 4 | (row[plane_words] >> 6 & each(3)) << 2 | (row[2 * plane_words] >> 6 & each(3));
    } else if constexpr (Bits == 3) {
      if (q < 6) return row[plane_words * (q / 2)] >> 3 * (q % 2) & each(7);
      return (row[plane_words * (q - 6)] >> 6 & each(3)) | (row[2 * plane_words] >> q & each(1)) << 2;
    } else {
      constexpr int fields = 8 / Bits;
      return row[plane_words * (q / fields)] >> Bits * (q % fields) & each(codewords - 1);
    }
  }

  // The inverse for a whole row: quad(q) gives the codes, each below `codewords`, and behind the last ones the word of signs.
  template <class Quad>
  static __device__ __forceinline__ void encode(std::uint32_t* row, Quad quad) {
#pragma unroll
    for (int p = 0; p < planes; ++p) {
      std::uint32_t word = 0;
      if constexpr (Bits == 6) {
        word = quad(p) | (quad(3) >> 2 * (2 - p) & each(3)) << 6;
      } else if constexpr (Bits == 3) {
        word = quad(2 * p) | quad(2 * p + 1) << 3;
        word |= p < 2 ? (quad(6 + p) & each(3)) << 6 : (quad(6) >> 2 & each(1)) << 6 | (quad(7) >> 2 & each(1)) << 7;
      } else {
        constexpr int fields = has_signs ? 1 : 8 / Bits;
#pragma unroll
        for (int f = 0; f < fields; ++f) word |= quad(fields * p + f) << Bits * f;
      }
      row[plane_words * p] = word;
    }
  }
};

}  // namespace gptvq
