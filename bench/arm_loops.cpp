// The inner loops of a product on Arm NEON with dot products, one block of 32 columns and one tile of 16 rows per iteration:
// this package's packed bytes against 4-bit integers in the same tiles.  Measured by arm_mca.py, which counts their cycles.
//
// In a 64-byte plane, byte 4r + j belongs to row r.  Four vectors of 16 bytes hold four rows each; one dot product takes four
// bytes of every row against the same four activations.  Activations of 2D codes come in the order in which planes are decoded.
#include <arm_neon.h>

#include <cstdint>

// What llvm-mca counts lies between two marks.  They keep the compiler from unrolling, not from hoisting constants.
#define BEGIN(name) asm volatile("# LLVM-MCA-BEGIN " name)
#define END() asm volatile("# LLVM-MCA-END")

namespace {

constexpr long kBlockCols = 32;

template <int kLane>
int32x4_t dot(int32x4_t sum, int8x16_t weights, int8x16_t x) { return vdotq_laneq_s32(sum, weights, x, kLane); }

void store(std::int32_t* y, const int32x4_t (&sum)[4]) {
  for (int i = 0; i < 4; ++i) vst1q_s32(y + 4 * i, sum[i]);
}

uint8x16_t low_nibble(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }
uint8x16_t high_nibble(uint8x16_t bytes) { return vshrq_n_u8(bytes, 4); }

// q - 8, or q itself where -8 sum(x) is added once per block.
template <bool kFolded>
int8x16_t level(uint8x16_t nibbles) {
  const int8x16_t q = vreinterpretq_s8_u8(nibbles);
  return kFolded ? q : vsubq_s8(q, vdupq_n_s8(8));
}

template <bool kFolded>
void int4_block(const std::uint8_t* weights, const std::int8_t* x, int32x4_t (&sum)[4]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int8x16_t xs = vld1q_s8(x + 16 * half);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t a = vld1q_u8(weights + 128 * half + 16 * i), b = vld1q_u8(weights + 128 * half + 64 + 16 * i);
      sum[i] = dot<0>(sum[i], level<kFolded>(low_nibble(a)), xs);
      sum[i] = dot<1>(sum[i], level<kFolded>(high_nibble(a)), xs);
      sum[i] = dot<2>(sum[i], level<kFolded>(low_nibble(b)), xs);
      sum[i] = dot<3>(sum[i], level<kFolded>(high_nibble(b)), xs);
    }
  }
}

}  // namespace

extern "C" {

// weights [blocks][2][64]; tables s8 [2][16]; x s8 [blocks][32], per 16 columns 0 2 4 6 | 1 3 5 7 | 8 10 12 14 | 9 11 13 15.
void vq_2d_k16(const std::uint8_t* weights, const std::int8_t* tables, const std::int8_t* x, std::int32_t* y, long blocks) {
  const int8x16_t even = vld1q_s8(tables), odd = vld1q_s8(tables + 16);
  int32x4_t sum[4] = {};
  for (; blocks > 0; --blocks, weights += 128, x += kBlockCols) {
    BEGIN("vq_2d_k16");
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int8x16_t xs = vld1q_s8(x + 16 * half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t bytes = vld1q_u8(weights + 64 * half + 16 * i), lo = low_nibble(bytes), hi = high_nibble(bytes);
        sum[i] = dot<0>(sum[i], vqtbl1q_s8(even, lo), xs);
        sum[i] = dot<1>(sum[i], vqtbl1q_s8(odd, lo), xs);
        sum[i] = dot<2>(sum[i], vqtbl1q_s8(even, hi), xs);
        sum[i] = dot<3>(sum[i], vqtbl1q_s8(odd, hi), xs);
      }
    }
    END();
  }
  store(y, sum);
}

// weights [blocks][3][64]: planes A, B, C, whose upper bits make the fourth index; tables s8 [2][64]; x as for vq_2d_k16 with
// 8 columns at a time: 0 2 4 6 | 1 3 5 7 | 8 10 .. .
void vq_2d_k64(const std::uint8_t* weights, const std::int8_t* tables, const std::int8_t* x, std::int32_t* y, long blocks) {
  const int8x16x4_t even = vld1q_s8_x4(tables), odd = vld1q_s8_x4(tables + 64);
  const uint8x16_t six = vdupq_n_u8(63);
  int32x4_t sum[4] = {};
  for (; blocks > 0; --blocks, weights += 192, x += kBlockCols) {
    BEGIN("vq_2d_k64");
    const int8x16_t x0 = vld1q_s8(x), x1 = vld1q_s8(x + 16);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t a = vld1q_u8(weights + 16 * i), b = vld1q_u8(weights + 64 + 16 * i), c = vld1q_u8(weights + 128 + 16 * i);
      const uint8x16_t d = vsriq_n_u8(vsriq_n_u8(vshrq_n_u8(a, 2), b, 4), c, 6);
      const uint8x16_t index[4] = {vandq_u8(a, six), vandq_u8(b, six), vandq_u8(c, six), d};
      sum[i] = dot<0>(sum[i], vqtbl4q_s8(even, index[0]), x0);
      sum[i] = dot<1>(sum[i], vqtbl4q_s8(odd, index[0]), x0);
      sum[i] = dot<2>(sum[i], vqtbl4q_s8(even, index[1]), x0);
      sum[i] = dot<3>(sum[i], vqtbl4q_s8(odd, index[1]), x0);
      sum[i] = dot<0>(sum[i], vqtbl4q_s8(even, index[2]), x1);
      sum[i] = dot<1>(sum[i], vqtbl4q_s8(odd, index[2]), x1);
      sum[i] = dot<2>(sum[i], vqtbl4q_s8(even, index[3]), x1);
      sum[i] = dot<3>(sum[i], vqtbl4q_s8(odd, index[3]), x1);
    }
    END();
  }
  store(y, sum);
}

// weights [blocks][4][64]: in plane p, byte 4r + j holds columns 8p + j (low) and 8p + 4 + j (high); x s8 [blocks][32], in order.
void int4(const std::uint8_t* weights, const std::int8_t*, const std::int8_t* x, std::int32_t* y, long blocks) {
  int32x4_t sum[4] = {};
  for (; blocks > 0; --blocks, weights += 256, x += kBlockCols) {
    BEGIN("int4");
    int4_block<false>(weights, x, sum);
    END();
  }
  store(y, sum);
}

// As int4, without its -8: the caller adds -8 sum(x).
void int4_folded(const std::uint8_t* weights, const std::int8_t*, const std::int8_t* x, std::int32_t* y, long blocks) {
  int32x4_t sum[4] = {};
  for (; blocks > 0; --blocks, weights += 256, x += kBlockCols) {
    BEGIN("int4_folded");
    int4_block<true>(weights, x, sum);
    END();
  }
  store(y, sum);
}
}
