// AArch64 with the dot product instructions: a tile is four registers, a lookup in 16 or 64 entries one tbl.
#include "cpu/linear_kernel.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

struct Neon {
  static constexpr int rows = 16, tokens = 2, wide_tokens = 0, chains = 2;
  static constexpr bool offset = false;
  static constexpr bool finds_256 = true, nibbles = false;
  struct Bytes { uint8x16_t v[4]; };                        // rows 0..3, 4..7, 8..11, 12..15
  struct Weights { int8x16_t v[4]; };
  struct Ints { int32x4_t v[4]; };
  struct Floats { float32x4_t v[4]; };
  using Index = Bytes;
  using Activation = int8_t;
  using Four = int8x16_t;

  // {f(0), ..., f(3)}
  template <class All, class F>
  static GPTVQ_INLINE All each(F&& f) { return {{f(0), f(1), f(2), f(3)}}; }

  static GPTVQ_INLINE Bytes load(const uint8_t* p) {
    return each<Bytes>([&](int h) __attribute__((always_inline)) { return vld1q_u8(p + 16 * h); });
  }
  template <int N>
  static GPTVQ_INLINE Bytes down(Bytes b) {
    if constexpr (N == 0) return b;
    else return each<Bytes>([&](int h) __attribute__((always_inline)) { return vshrq_n_u8(b.v[h], N); });
  }
  template <int Mask>
  static GPTVQ_INLINE Bytes pick(Bytes where_set, Bytes elsewhere) {
    return each<Bytes>([&](int h) __attribute__((always_inline)) { return vbslq_u8(vdupq_n_u8(Mask), where_set.v[h], elsewhere.v[h]); });
  }

  // One codebook; tbl gives 0 beyond its entries, tbx what there was before.
  template <int K, bool One>
  struct Table {
    static constexpr int kRegisters = K > 16 ? K / 16 : 1;
    int8x16_t entries[kRegisters];

    GPTVQ_INLINE void load(const int8_t* p) {
      int8_t repeated[16];
      if constexpr (K < 16) {
        for (int i = 0; i < 16; i += K) memcpy(repeated + i, p, K);
        p = repeated;
      }
      for (int i = 0; i < kRegisters; ++i) entries[i] = vld1q_s8(p + 16 * i);
    }
    GPTVQ_INLINE Index index(Bytes code) const {
      if constexpr (K == 256) return code;
      else
        return each<Index>([&](int h) __attribute__((always_inline)) { return vandq_u8(code.v[h], vdupq_n_u8(K > 16 ? K - 1 : 15)); });
    }
    GPTVQ_INLINE Weights find(Index at) const {
      return each<Weights>([&](int h) __attribute__((always_inline)) {
        if constexpr (K <= 16) {
          return vqtbl1q_s8(entries[0], at.v[h]);
        } else {
          int8x16_t found = vqtbl4q_s8({{entries[0], entries[1], entries[2], entries[3]}}, at.v[h]);
          GPTVQ_UNROLL for (int i = 4; i < kRegisters; i += 4) {
            const int8x16x4_t more = {{entries[i], entries[i + 1], entries[i + 2], entries[i + 3]}};
            found = vqtbx4q_s8(found, more, vsubq_u8(at.v[h], vdupq_n_u8(16 * i)));
          }
          return found;
        }
      });
    }
  };

  // 16 entries per four rows.
  template <int K>
  struct Table<K, false> {
    Weights entries;
    uint8x16_t offsets;

    GPTVQ_INLINE void load(const int8_t* const* book, int64_t at, const uint8_t* lane_offset) {
      int8_t all[64];
      for (int s = 0; s < 64 / K; ++s) memcpy(all + s * K, book[s] + at, K);
      entries = each<Weights>([&](int h) __attribute__((always_inline)) { return vld1q_s8(all + 16 * h); });
      offsets = vld1q_u8(lane_offset);
    }
    GPTVQ_INLINE Index index(Bytes code) const {
      return each<Index>([&](int h) __attribute__((always_inline)) { return vorrq_u8(vandq_u8(code.v[h], vdupq_n_u8(K - 1)), offsets); });
    }
    GPTVQ_INLINE Weights find(Index at) const {
      return each<Weights>([&](int h) __attribute__((always_inline)) { return vqtbl1q_s8(entries.v[h], at.v[h]); });
    }
  };

  // Negated where byte I of a row's four has bit Bit + j, for its j-th weight.
  template <int Bit, int I, class Table>
  static GPTVQ_INLINE Weights with_signs(const Table& table, const Index& at, const Bytes& signs) {
    constexpr uint8x16_t kRow = {I, I, I, I, I + 4, I + 4, I + 4, I + 4, I + 8, I + 8, I + 8, I + 8, I + 12, I + 12, I + 12, I + 12};
    const uint8x16_t bits = vreinterpretq_u8_u32(vdupq_n_u32(0x08040201u << Bit));
    const Weights w = table.find(at);
    return each<Weights>([&](int h) __attribute__((always_inline)) {
      const int8x16_t negative = vreinterpretq_s8_u8(vtstq_u8(vqtbl1q_u8(signs.v[h], kRow), bits));
      return vsubq_s8(veorq_s8(w.v[h], negative), negative);
    });
  }

  static GPTVQ_INLINE Ints whole(int32_t v) {
    return each<Ints>([&](int) __attribute__((always_inline)) { return vdupq_n_s32(v); });
  }
  static GPTVQ_INLINE Ints add(Ints a, Ints b) {
    return each<Ints>([&](int h) __attribute__((always_inline)) { return vaddq_s32(a.v[h], b.v[h]); });
  }
  static GPTVQ_INLINE Four four(const int8_t* x) {
    int32_t word;
    memcpy(&word, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
  }
  static GPTVQ_INLINE void dot(Ints& sum, const Weights& w, const Activation* columns) {
    const Four x = four(columns);
    for (int h = 0; h < 4; ++h) sum.v[h] = vdotq_s32(sum.v[h], w.v[h], x);
  }
  static GPTVQ_INLINE Floats real(Ints a) {
    return each<Floats>([&](int h) __attribute__((always_inline)) { return vcvtq_f32_s32(a.v[h]); });
  }
  static GPTVQ_INLINE Floats full(float v) {
    return each<Floats>([&](int) __attribute__((always_inline)) { return vdupq_n_f32(v); });
  }
  static GPTVQ_INLINE Floats mul(Floats a, Floats b) {
    return each<Floats>([&](int h) __attribute__((always_inline)) { return vmulq_f32(a.v[h], b.v[h]); });
  }
  static GPTVQ_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return each<Floats>([&](int h) __attribute__((always_inline)) { return vfmaq_f32(c.v[h], a.v[h], b.v[h]); });
  }
  static GPTVQ_INLINE Floats floats(const float* p) {
    return each<Floats>([&](int h) __attribute__((always_inline)) { return vld1q_f32(p + 4 * h); });
  }

  template <bool One>
  static GPTVQ_INLINE Floats group_scale(const LinearArgs& a, int64_t row, int64_t strip) {
    if constexpr (One) return full(from_bits(static_cast<uint32_t>(a.gs[row / 16 * a.strips + strip]) << 16));
    return portable_group_scale<Neon>(a, row, strip);
  }

  // The 16 floats of a block are the 64 bytes of one tbl: 4 code + 0..3 for each row.
  static GPTVQ_INLINE Floats block_scale(const uint8_t* pair, const LinearSpan& span, const float* of_codes) {
    const uint8x16_t both = vld1q_u8(pair);
    const uint8x16_t first = vshlq_n_u8(span.shift ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15)), 2);
    const auto* bytes = reinterpret_cast<const uint8_t*>(of_codes);
    const uint8x16x4_t table = {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
    const uint8x16_t lanes = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3}, inside = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    return each<Floats>([&](int h) __attribute__((always_inline)) {
      const uint8x16_t spread = vqtbl1q_u8(first, vaddq_u8(lanes, vdupq_n_u8(static_cast<uint8_t>(4 * h))));
      return vreinterpretq_f32_u8(vqtbl4q_u8(table, vaddq_u8(spread, inside)));
    });
  }

  static GPTVQ_INLINE void store(const LinearArgs& a, int64_t row, int64_t token, Floats v) {
    float values[rows];
    for (int h = 0; h < 4; ++h) vst1q_f32(values + 4 * h, v.v[h]);
    portable_store(a, row, token, values, rows);
  }

  static GPTVQ_INLINE uint32_t peak(const float* x, int64_t count) {
    uint32x4_t most = vdupq_n_u32(0);
    for (int64_t i = 0; i < count; i += 4)
      most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffffu)));
    return vmaxvq_u32(most);
  }

  static GPTVQ_INLINE int8x16_t narrow(const int32x4_t* v) {
    const auto eight = [&](int i) { return vmovn_s16(vcombine_s16(vmovn_s32(v[i]), vmovn_s32(v[i + 1]))); };
    return vcombine_s8(eight(0), eight(2));
  }

  template <int Dim, int Planes>
  static GPTVQ_INLINE void sixteen(const float* x, float inverse, bool finite, int8_t* hi, int8_t* lo, Ints*) {
    constexpr uint8x16_t kInOrder = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    constexpr uint8x16_t kOrder = Dim == 1   ? kInOrder
                                  : Dim == 2 ? uint8x16_t{0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15}
                                             : uint8x16_t{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const uint32x4_t keep = vdupq_n_u32(finite ? ~0u : 0u);
    int32x4_t high[4], low[4];
    for (int i = 0; i < 4; ++i) {
      const float32x4_t scaled = vmulq_n_f32(vld1q_f32(x + 4 * i), inverse);
      const float32x4_t whole = vrndnq_f32(vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(scaled), keep)));
      high[i] = vcvtnq_s32_f32(Planes == 2 ? vmulq_n_f32(whole, 1.f / 254.f) : whole);
      low[i] = vcvtnq_s32_f32(vfmsq_n_f32(whole, vcvtq_f32_s32(high[i]), 254.f));
    }
    vst1q_s8(hi, vqtbl1q_s8(narrow(high), kOrder));
    if constexpr (Planes == 2) vst1q_s8(lo, vqtbl1q_s8(narrow(low), kOrder));
  }
};

}  // namespace

namespace gptvq {

LinearKernel linear_neon(int code_bits, int dim, int planes, bool one_book, bool halves) {
  return kernels<Neon>(code_bits, dim, planes, one_book, halves);
}

bool neon_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;                                              // every Apple processor of this architecture
#endif
}

}  // namespace gptvq
#endif
