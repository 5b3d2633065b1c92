// The packed index layout (cpu/layout.h has the picture) as a thread of a GPU reads and writes it.
//
// `row` points at the word of plane 0 that belongs to a row of a block; the row's other words follow 16 words apart.
#pragma once
#include "cpu/layout.h"
#include "cuda/platform.cuh"

namespace gptvq {

template <int Bits, int Dim>
struct DeviceLayout {
  static constexpr int codewords = 1 << Bits, vectors = 32 / Dim, quads = vectors / 4, planes = vectors * Bits / 32;
  static constexpr int block_bytes = 64 * planes, plane_words = 16;

  static __device__ __forceinline__ constexpr std::uint32_t each(std::uint32_t byte) { return byte * 0x01010101u; }

  // Codes of vectors 4 q .. 4 q + 3 of the block, a byte each, all below `codewords`.
  static __device__ __forceinline__ std::uint32_t quad(const std::uint32_t* row, int q) {
    if constexpr (Bits == 8) {
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

  // The inverse for a whole row: quad(q) gives the codes, each below `codewords`.
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
        constexpr int fields = 8 / Bits;
#pragma unroll
        for (int f = 0; f < fields; ++f) word |= quad(fields * p + f) << Bits * f;
      }
      row[plane_words * p] = word;
    }
  }
};

}  // namespace gptvq
