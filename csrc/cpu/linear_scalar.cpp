// Plain C++, for processors without any of the other sets, and as the plainest form of the kernels.
#include "cpu/linear_kernel.h"

// Loops over 64 bytes: inlined in every quad of every kernel they would make megabytes of code, and no less work.
#define GPTVQ_CALL __attribute__((noinline))

namespace {

struct Scalar {
  static constexpr int rows = 16, tokens = 1, wide_tokens = 0, chains = 1;
  static constexpr bool offset = false;
  static constexpr bool finds_256 = true, nibbles = false;
  struct Bytes { uint8_t v[4 * rows]; };
  struct Ints { int32_t v[rows]; };
  struct Floats { float v[rows]; };
  struct Four { int16_t v[4]; };
  using Index = Bytes;
  using Weights = Bytes;
  using Activation = int16_t;

  static GPTVQ_INLINE Bytes load(const uint8_t* p) {
    Bytes b;
    memcpy(b.v, p, sizeof b.v);
    return b;
  }
  template <int N>
  static GPTVQ_CALL Bytes down(const Bytes& from) {
    Bytes to;
    for (int i = 0; i < 4 * rows; ++i) to.v[i] = static_cast<uint8_t>(from.v[i] >> N);
    return to;
  }
  template <int Mask>
  static GPTVQ_CALL Bytes pick(const Bytes& where_set, const Bytes& elsewhere) {
    Bytes to;
    for (int i = 0; i < 4 * rows; ++i) to.v[i] = static_cast<uint8_t>((where_set.v[i] & Mask) | (elsewhere.v[i] & ~Mask));
    return to;
  }

  template <int K, bool One>
  struct Table {
    int8_t entries[One ? K : 4 * rows];
    uint8_t offsets[16];

    GPTVQ_INLINE void load(const int8_t* p) {
      memcpy(entries, p, K);
      memset(offsets, 0, sizeof offsets);
    }
    GPTVQ_INLINE void load(const int8_t* const* book, int64_t at, const uint8_t* lane_offset) {
      for (int s = 0; s < 4 * rows / K; ++s) memcpy(entries + s * K, book[s] + at, K);
      memcpy(offsets, lane_offset, sizeof offsets);
    }
    GPTVQ_CALL Index index(const Bytes& code) const {
      Index at;
      for (int i = 0; i < 4 * rows; ++i) at.v[i] = static_cast<uint8_t>((code.v[i] & (K - 1)) | offsets[i % 16]);
      return at;
    }
    GPTVQ_CALL Bytes find(const Index& at) const {
      Bytes w;
      for (int i = 0; i < 4 * rows; ++i) w.v[i] = static_cast<uint8_t>(entries[(One ? 0 : i / 16 * 16) + at.v[i]]);
      return w;
    }
  };

  // Negated where byte I of a row's four has bit Bit + j, for its j-th weight.
  template <int Bit, int I, class Table>
  static GPTVQ_CALL Weights with_signs(const Table& table, const Index& at, const Bytes& signs) {
    Weights w = table.find(at);
    for (int i = 0; i < 4 * rows; ++i)
      if (signs.v[i / 4 * 4 + I] >> (Bit + i % 4) & 1) w.v[i] = static_cast<uint8_t>(-w.v[i]);
    return w;
  }

  static GPTVQ_INLINE Ints whole(int32_t value) {
    Ints all;
    for (int32_t& v : all.v) v = value;
    return all;
  }
  static GPTVQ_INLINE Ints add(Ints a, Ints b) {
    for (int r = 0; r < rows; ++r) a.v[r] += b.v[r];
    return a;
  }
  static GPTVQ_INLINE Four four(const int16_t* x) {
    Four f;
    memcpy(f.v, x, sizeof f.v);
    return f;
  }
  static GPTVQ_CALL void dot(Ints& sum, const Bytes& weights, const Activation* columns) {
    const Four x = four(columns);
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < 4; ++j) sum.v[r] += static_cast<int8_t>(weights.v[4 * r + j]) * x.v[j];
  }
  static GPTVQ_INLINE Floats real(Ints a) {
    Floats f;
    for (int r = 0; r < rows; ++r) f.v[r] = static_cast<float>(a.v[r]);
    return f;
  }
  static GPTVQ_INLINE Floats full(float value) {
    Floats all;
    for (float& v : all.v) v = value;
    return all;
  }
  static GPTVQ_INLINE Floats mul(Floats a, const Floats& b) {
    for (int r = 0; r < rows; ++r) a.v[r] *= b.v[r];
    return a;
  }
  static GPTVQ_INLINE Floats fma(const Floats& a, const Floats& b, Floats c) {
    for (int r = 0; r < rows; ++r) c.v[r] += a.v[r] * b.v[r];
    return c;
  }

  template <bool One>
  static GPTVQ_INLINE Floats group_scale(const LinearArgs& a, int64_t row, int64_t strip) {
    return portable_group_scale<Scalar>(a, row, strip);
  }
  static GPTVQ_INLINE Floats block_scale(const uint8_t* pair, const LinearSpan& span, const float* table) {
    return portable_block_scale<Scalar>(pair, span, table);
  }
  static GPTVQ_INLINE void store(const LinearArgs& a, int64_t row, int64_t token, Floats v) { portable_store(a, row, token, v.v, rows); }
  static GPTVQ_INLINE uint32_t peak(const float* x, int64_t count) { return portable_peak(x, count); }
  template <int Dim, int Planes>
  static GPTVQ_INLINE void sixteen(const float* x, float inverse, bool finite, int16_t* to, int16_t*, Ints*) {
    portable_sixteen<Dim, Planes, int16_t>(x, inverse, finite, to, to);
  }
  static GPTVQ_INLINE Floats floats(const float* p) {
    Floats f;
    memcpy(f.v, p, sizeof f.v);
    return f;
  }
};

}  // namespace

namespace gptvq {

LinearKernel linear_scalar(int code_bits, int dim, int planes, bool one_book, bool halves) {
  return kernels<Scalar>(code_bits, dim, planes, one_book, halves);
}

}  // namespace gptvq
