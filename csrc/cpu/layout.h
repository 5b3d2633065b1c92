// The packed index layout, for one row of one block.
//
// A block holds the codes of 16 rows x 32 columns in planes of 64 bytes; byte 4 r + j of a plane belongs to row r.
// A row's four bytes of a plane form one 32-bit word ("plane" below); four consecutive codes, a byte each, form one
// word too ("quad").  All shifts stay within bytes after masking, so neither byte order nor alignment matters.
//
//   bits  codes of quad q in the planes of the row
//   2     plane q / 4, bits 2 (q % 4)+
//   3     q < 6: plane q / 2, bits 0+ or 3+;  quad 6: bits 6+ of plane 0, third bit in bit 6 of plane 2;
//         quad 7: bits 6+ of plane 1, third bit in bit 7 of plane 2
//   4     plane q / 2, low or high nibble
//   6     q < 3: plane q, bits 0+;  quad 3: bits 6+ of planes 2, 1, 0, from its low bits to its high bits
//   8     plane q
//   12    plane q, a byte for the number of each centroid; byte i of plane 2 has the signs of dimension i, bit v of vector v
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "common/tensor.h"

namespace gptvq {

template <int Bits, int Dim>
struct Format {
  static constexpr bool has_signs = Bits > 8;
  static constexpr int bits = Bits, dim = Dim, codewords = 1 << (has_signs ? 8 : Bits);
  using Code = std::conditional_t<has_signs, std::uint16_t, std::uint8_t>;
  static constexpr int vectors = 32 / Dim, quads = vectors / 4, planes = vectors * Bits / 32;

  static constexpr std::uint32_t each(std::uint32_t byte) { return byte * 0x01010101u; }

  static int number(Code code) { return code & (codewords - 1); }        // of its centroid
  static int sign_bits(Code code) { return has_signs ? code >> 8 : 0; }

  // codes: `vectors` of them.
  static void decode_row(const std::uint8_t* block, int row, Code* codes) {
    std::uint32_t plane[planes], quad[quads];
    for (int p = 0; p < planes; ++p) std::memcpy(&plane[p], block + 64 * p + 4 * row, 4);
    if constexpr (has_signs) {
      for (int v = 0; v < vectors; ++v) {
        std::uint32_t code = plane[v / 4] >> 8 * (v % 4) & 255;
        for (int i = 0; i < dim; ++i) code |= (plane[2] >> (8 * i + v) & 1) << (8 + i);
        codes[v] = static_cast<Code>(code);
      }
    } else if constexpr (Bits == 6) {
      for (int q = 0; q < 3; ++q) quad[q] = plane[q] & each(63);
      quad[3] = (plane[0] >> 6 & each(3)) << 4 | (plane[1] >> 6 & each(3)) << 2 | (plane[2] >> 6 & each(3));
    } else if constexpr (Bits == 3) {
      for (int q = 0; q < 6; ++q) quad[q] = plane[q / 2] >> 3 * (q % 2) & each(7);
      quad[6] = (plane[0] >> 6 & each(3)) | (plane[2] >> 6 & each(1)) << 2;
      quad[7] = (plane[1] >> 6 & each(3)) | (plane[2] >> 7 & each(1)) << 2;
    } else {
      constexpr int fields = 8 / Bits;
      for (int q = 0; q < quads; ++q) quad[q] = plane[q / fields] >> Bits * (q % fields) & each(codewords - 1);
    }
    if constexpr (!has_signs) std::memcpy(codes, quad, sizeof quad);
  }

  // Inverse of decode_row; the codes must be below 1 << Bits.
  static void encode_row(const Code* codes, int row, std::uint8_t* block) {
    std::uint32_t plane[planes] = {}, quad[quads];
    if constexpr (!has_signs) std::memcpy(quad, codes, sizeof quad);
    if constexpr (has_signs) {
      for (int v = 0; v < vectors; ++v) {
        plane[v / 4] |= static_cast<std::uint32_t>(number(codes[v])) << 8 * (v % 4);
        for (int i = 0; i < dim; ++i) plane[2] |= static_cast<std::uint32_t>(sign_bits(codes[v]) >> i & 1) << (8 * i + v);
      }
    } else if constexpr (Bits == 6) {
      for (int p = 0; p < 3; ++p) plane[p] = quad[p] | (quad[3] >> 2 * (2 - p) & each(3)) << 6;
    } else if constexpr (Bits == 3) {
      for (int q = 0; q < 6; ++q) plane[q / 2] |= quad[q] << 3 * (q % 2);
      plane[0] |= (quad[6] & each(3)) << 6;
      plane[1] |= (quad[7] & each(3)) << 6;
      plane[2] |= (quad[6] >> 2 & each(1)) << 6 | (quad[7] >> 2 & each(1)) << 7;
    } else {
      constexpr int fields = 8 / Bits;
      for (int q = 0; q < quads; ++q) plane[q / fields] |= quad[q] << Bits * (q % fields);
    }
    for (int p = 0; p < planes; ++p) std::memcpy(block + 64 * p + 4 * row, &plane[p], 4);
  }
};

// Calls f(Format<...>{}) with the format of a checked spec.
template <class F>
void with_format(const Spec& s, F&& f) {
  switch (10 * s.dim + s.index_bits) {
    case 12: return f(Format<2, 1>{});
    case 13: return f(Format<3, 1>{});
    case 14: return f(Format<4, 1>{});
    case 22: return f(Format<4, 2>{});
    case 23: return f(Format<6, 2>{});
    case 24: return f(Format<8, 2>{});
    case 42: return f(Format<8, 4>{});
    case 43: return f(Format<12, 4>{});
  }
  throw std::invalid_argument("spec: no kernel decodes dim=" + std::to_string(s.dim) + " with index_bits=" +
                              std::to_string(s.index_bits));
}

}  // namespace gptvq
