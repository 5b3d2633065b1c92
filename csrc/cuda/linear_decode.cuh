// Packed codes to fragments of mma.m16n8k32 s8, straight from the file's layout (cpu/layout.h); nothing is repacked.
//
// A chunk is 16 rows x 256 columns of one strip, a warp's work at a time: 8 steps of the mma.  Lane 4 g + t holds
//   rows     2 g (the mma's row g) and 2 g + 1 (row g + 8), whose words lie side by side in every plane: one 8-byte load takes both
//   columns  units 4 i + t of each round i, where a unit is as many columns as a row's word (three words, for 3 bits a weight) holds
// so that a warp's load is whole sectors.  The mma sums over columns: their order within a chunk is free, and the activations are
// stored in the order in which codes come out (`column_at`).
//
//   bits a weight   unit              rounds   steps a round    lookup of a code
//   2               16, one word      4        2                1D K4, 2D K16: byte_perm on registers; 4D K256: shared memory
//   3               32, three words   2        4                1D K8: byte_perm; 2D K64: a table of 32 banks, one word each;
//                                                               4D K256 with signs: shared memory, and the signs from the third word
//   4               8, one word       8        1                1D K16: byte_perm; 2D K256: shared memory
#pragma once
#include "cuda/platform.cuh"

namespace gptvq {

constexpr int kChunk = 256, kSteps = 8;

// Where the centroids of a format are looked up.
enum class Lookup { registers, warp_table, cta_table };

template <int Bits, int Dim>
struct LinearFormat {
  static constexpr int bits = Bits, dim = Dim, codewords = 1 << (Bits > 8 ? 8 : Bits), rate = Bits / Dim;
  static constexpr int unit = rate == 2 ? 16 : rate == 3 ? 32 : 8;
  static constexpr int words = rate == 3 ? 3 : 1;             // of a row in a unit
  static constexpr int rounds = kChunk / (4 * unit), steps = unit / 8;
  static constexpr int block_bytes = 64 * rate;
  static constexpr Lookup lookup = Bits <= 4 ? Lookup::registers : Bits == 6 ? Lookup::warp_table : Lookup::cta_table;
  static constexpr bool by_step = lookup == Lookup::cta_table && words == 3;      // 64 registers do not hold a round's fragments too
  static constexpr int books = Dim == 1 ? 2 : 1;              // per lane: rows 2 g and 2 g + 1 may belong to different groups
  static constexpr int book_words = codewords * Dim / 4;      // of a codebook in registers

  // Column of a unit that is byte b of fragment word w of the unit's step j.
  static __host__ __device__ constexpr int column(int j, int w, int b) {
    const int n = 4 * w + b;                                  // nibbles come out as columns 0, 4, 1, 5, 2, 6, 3, 7
    if (Bits == 2) return 4 * (j + 2 * (n & 1)) + n / 2;
    if (Bits == 3) return 8 * j + 4 * (n & 1) + n / 2;
    if (Bits == 4 && Dim == 1) return 4 * (n & 1) + n / 2;
    if (Bits == 4) return 2 * (4 * (b & 1) + (4 * j + b) / 2) + w;
    return 8 * j + n;
  }

  // Column of the chunk whose activation is byte `position` of a plane: 16 bytes are a lane's words of two steps.
  static __host__ __device__ constexpr int column_at(int position) {
    const int s = position / 64 * 2 + position / 8 % 2, t = position / 16 % 4;
    return (s / steps * 4 + t) * unit + column(s % steps, position / 4 % 2, position % 4);
  }
};

// A lane's codes of a chunk.
template <class F>
struct Codes {
  uint2 word[F::rounds][F::words];

  // from: the lane's words of the chunk's first round; `units`: from the lane's first on, how many the chunk has.
  __device__ __forceinline__ void load(const std::uint8_t* from, int units) {
#pragma unroll
    for (int i = 0; i < F::rounds; ++i)
#pragma unroll
      for (int p = 0; p < F::words; ++p)
        word[i][p] = load_stream_if(4 * i < units, reinterpret_cast<const uint2*>(from + 64 * (4 * F::words * i + p)));
  }

  __device__ __forceinline__ std::uint32_t row(int i, int p, int r) const { return r ? word[i][p].y : word[i][p].x; }
};

// Four table entries by the nibbles 0..3 of `low` (0..7 each; bits above 15 are ignored); `high` picks the upper half of the table.
__device__ __forceinline__ std::uint32_t find16(const std::uint32_t* table, std::uint32_t low, std::uint32_t high) {
  return prmt(prmt(table[0], table[1], low), prmt(table[2], table[3], low), high);
}

// Where a lane finds the weights of its codes.
template <class F, Lookup = F::lookup>
struct Table;

template <class F>
struct Table<F, Lookup::registers> {
  std::uint32_t entry[F::books][F::book_words], two_to_16;

  // two_to_16: 65536, from where the compiler does not see it, so that the multiplier shifts and not the pipe that looks up.
  __device__ __forceinline__ explicit Table(std::uint32_t two_to_16) : two_to_16(two_to_16) {}
  __device__ __forceinline__ void load(const std::int8_t* const (&book)[2]) {
#pragma unroll
    for (int r = 0; r < F::books; ++r) {
      if constexpr (F::book_words == 1) {
        entry[r][0] = __ldg(reinterpret_cast<const std::uint32_t*>(book[r]));
      } else if constexpr (F::book_words == 2) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(book[r]));
        entry[r][0] = v.x, entry[r][1] = v.y;
      } else {
#pragma unroll
        for (int i = 0; i < F::book_words; i += 4) {
          const uint4 v = __ldg(reinterpret_cast<const uint4*>(book[r]) + i / 4);
          entry[r][i] = v.x, entry[r][i + 1] = v.y, entry[r][i + 2] = v.z, entry[r][i + 3] = v.w;
        }
      }
    }
  }

  // a[step of round i][word]: weights of row r.
  __device__ __forceinline__ void decode(const Codes<F>& codes, int i, int r, std::uint32_t (&a)[F::steps][2]) const {
    const std::uint32_t* book = entry[F::books == 2 ? r : 0];
    if constexpr (F::bits == 2) {
      const std::uint32_t w = codes.row(i, 0, r), even = w & 0x33333333u, odd = w >> 2 & 0x33333333u;
      a[0][0] = prmt(book[0], book[0], even);
      a[0][1] = prmt(book[0], book[0], even >> 16);
      a[1][0] = prmt(book[0], book[0], odd);
      a[1][1] = prmt(book[0], book[0], odd >> 16);
    } else if constexpr (F::bits == 3) {
      const std::uint32_t A = codes.row(i, 0, r), B = codes.row(i, 1, r), C = codes.row(i, 2, r);
      std::uint32_t n[4];
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        const std::uint32_t w = codes.row(i, p, r);
        n[p] = (w & 0x07070707u) | (w << 1 & 0x70707070u);
      }
      n[3] = (A >> 6 & 0x03030303u) | (B >> 2 & 0x30303030u) | (C >> 4 & 0x04040404u) | (C >> 1 & 0x40404040u);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        a[p][0] = prmt(book[0], book[1], n[p]);
        a[p][1] = prmt(book[0], book[1], n[p] >> 16);
      }
    } else {
      const std::uint32_t w = codes.row(i, 0, r);
      const std::uint32_t low = w & 0x77777777u, high = lop3<0xf8>(opaque(0x32103210u), w >> 1, opaque(0x44444444u));   // a | b & c
      if constexpr (F::dim == 1) {
        a[0][0] = find16(book, low, high);
        a[0][1] = find16(book, low >> 16, high >> 16);
      } else {
        a[0][0] = find16(book, low, high);
        a[0][1] = find16(book + 4, low, high);
        const std::uint32_t next_low = __umulhi(low, two_to_16), next_high = __umulhi(high, two_to_16);
        a[1][0] = find16(book, next_low, next_high);
        a[1][1] = find16(book + 4, next_low, next_high);
      }
    }
  }
};

// 64 pairs of bytes, one word per bank: no two lanes ever wait for each other.  Its address ends in zeros, which take the codes.
struct alignas(128) PairTable {
  std::uint32_t word[32];
};

template <class F>
struct Table<F, Lookup::warp_table> {
  SharedAddress table;              // of the warp, a multiple of 128

  __device__ __forceinline__ explicit Table(std::uint32_t) {}
  __device__ __forceinline__ std::uint32_t pair(std::uint32_t twice) const { return load_shared16((twice & 0x7e) | table); }
  __device__ __forceinline__ void quad(std::uint32_t codes, std::uint32_t (&a)[2]) const {
    a[0] = prmt(pair(codes << 1), pair(codes >> 7), 0x5410);
    a[1] = prmt(pair(codes >> 15), pair(codes >> 23), 0x5410);
  }
  __device__ __forceinline__ void decode(const Codes<F>& codes, int i, int r, std::uint32_t (&a)[F::steps][2]) const {
    const std::uint32_t A = codes.row(i, 0, r), B = codes.row(i, 1, r), C = codes.row(i, 2, r);
    quad(A, a[0]);
    quad(B, a[1]);
    quad(C, a[2]);
    quad((A >> 2 & 0x30303030u) | (B >> 4 & 0x0c0c0c0cu) | (C >> 6 & 0x03030303u), a[3]);
  }
};

// 256 entries of a word, each 32 times, once per bank.
template <class F>
struct Table<F, Lookup::cta_table> {
  const unsigned char* table;       // in shared memory
  std::uint32_t bank;               // 4 lane

  __device__ __forceinline__ Table(const uint4* entries, int lane)
      : table(reinterpret_cast<const unsigned char*>(entries)), bank(4 * lane) {}
  __device__ __forceinline__ std::uint32_t at(std::uint32_t shifted) const {
    return *reinterpret_cast<const std::uint32_t*>(table + ((shifted & 0x7f80) | bank));
  }
  // An entry with those bytes negated whose byte of `signs` has bit `v`: -w is ~w + 1, in which no byte carries, since w >= 1.
  static __device__ __forceinline__ std::uint32_t negated(std::uint32_t entry, std::uint32_t signs, int v) {
    const std::uint32_t mask = prmt(signs << (7 - v), 0, 0xba98);       // of each byte the top bit, eight times
    return (entry ^ mask) + (mask & 0x01010101u);
  }
  // The weights of vector v of row r's unit in round i, of a format with signs.
  __device__ __forceinline__ std::uint32_t quad(const Codes<F>& codes, int i, int r, int v) const {
    const std::uint32_t w = codes.row(i, v / 4, r);
    return negated(at(v % 4 ? w >> (8 * (v % 4) - 7) : w << 7), codes.row(i, 2, r), v);
  }
  __device__ __forceinline__ void decode(const Codes<F>& codes, int i, int r, std::uint32_t (&a)[F::steps][2]) const {
    const std::uint32_t w = codes.row(i, 0, r), e[4] = {at(w << 7), at(w >> 1), at(w >> 9), at(w >> 17)};
    if constexpr (F::dim == 4) {
      a[0][0] = e[0], a[0][1] = e[1], a[1][0] = e[2], a[1][1] = e[3];
    } else {
      a[0][0] = prmt(e[0], e[1], 0x5410);
      a[0][1] = prmt(e[2], e[3], 0x5410);
    }
  }
};

}  // namespace gptvq
