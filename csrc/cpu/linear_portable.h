// Parts of the linear kernels that run once per strip, span or output: plain loops for the sets without better instructions.
// Included like linear_kernel.h, and by it.
#pragma once

namespace {

GPTVQ_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <class V>
GPTVQ_INLINE typename V::Floats portable_group_scale(const LinearArgs& a, int64_t row, int64_t strip) {
  const uint16_t* gs = a.gs + (row / 16 * a.strips + strip) * a.groups_per_tile;
  float scale[V::rows];
  for (int r = 0; r < V::rows; ++r) scale[r] = from_bits(static_cast<uint32_t>(gs[a.row_group[(row + r) % 16]]) << 16);
  return V::floats(scale);
}

template <class V>
GPTVQ_INLINE typename V::Floats portable_block_scale(const uint8_t* pair, const LinearSpan& span, const float* table) {
  float scale[V::rows];
  for (int r = 0; r < V::rows; ++r) scale[r] = table[pair[r] >> span.shift & 15];
  return V::floats(scale);
}

GPTVQ_INLINE uint16_t half_bits(float value) {          // as round_to<Half> in cpu/float16.h
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t doubled = bits + bits, exponent = doubled & 0xff000000u;
  float base = fabsf(value) * 0x1.0p+112f * 0x1.0p-110f;
  base += from_bits(((exponent < 0x71000000u ? 0x71000000u : exponent) >> 1) + 0x07800000u);
  uint32_t rounded;
  memcpy(&rounded, &base, 4);
  const uint32_t magnitude = (rounded >> 13 & 0x7c00u) + (rounded & 0x0fffu);
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | (doubled > 0xff000000u ? 0x7e00u : magnitude));
}

GPTVQ_INLINE uint16_t bfloat_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

GPTVQ_INLINE void portable_store(const LinearArgs& a, int64_t row, int64_t token, const float* v, int count) {
  const int64_t at = token * a.y_stride + row, left = a.rows - row;
  for (int r = 0; r < count && r < left; ++r) {
    const float value = v[r] + (a.bias ? a.bias[row + r] : 0.f);
    if (a.type == 0) static_cast<float*>(a.y)[at + r] = value;
    else static_cast<uint16_t*>(a.y)[at + r] = a.type == 1 ? half_bits(value) : bfloat_bits(value);
  }
}

GPTVQ_INLINE uint32_t portable_peak(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

template <int Dim, int Planes, class Activation>
GPTVQ_INLINE void portable_sixteen(const float* x, float inverse, bool finite, Activation* hi, Activation* lo) {
  for (int i = 0; i < 16; ++i) {
    const int quad = i / (4 * Dim), inside = i % (4 * Dim);
    const int at = quad * 4 * Dim + inside % Dim * 4 + inside / Dim;
    const float whole = rintf(finite ? x[i] * inverse : 0.f);
    const float high = Planes == 2 && sizeof(Activation) == 1 ? rintf(whole * (1.f / 254.f)) : whole;
    hi[at] = static_cast<Activation>(high);
    if (Planes == 2 && sizeof(Activation) == 1) lo[at] = static_cast<Activation>(whole - 254.f * high);
  }
}

}  // namespace
