// float32 -> float16 and bfloat16, rounded to nearest even, without compiler extensions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace gptvq {

struct Half { std::uint16_t bits; };
struct BFloat { std::uint16_t bits; };

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(BFloat value) { return float_of(std::uint32_t{value.bits} << 16); }

inline float to_float(Half value) {
  const std::uint32_t shifted = std::uint32_t{value.bits & 0x7fffu} << 13;
  // Scaling by 2^112 rebiases the exponent, of subnormals too; infinity and NaN keep the largest one.
  const std::uint32_t magnitude = shifted >= 0x0f800000u ? shifted | 0x7f800000u : bits_of(float_of(shifted) * 0x1.0p+112f);
  return float_of(magnitude | std::uint32_t{value.bits & 0x8000u} << 16);
}

template <class T>
T round_to(float value);

template <>
inline float round_to<float>(float value) { return value; }

template <>
inline BFloat round_to<BFloat>(float value) {
  const std::uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

// The float addition of a power of two that leaves 10 mantissa bits does the rounding (after M. Dukhan's FP16 library).
template <>
inline Half round_to<Half>(float value) {
  const std::uint32_t bits = bits_of(value), doubled = bits + bits;
  float base = std::fabs(value) * 0x1.0p+112f * 0x1.0p-110f;        // to infinity where float16 overflows
  const std::uint32_t exponent = doubled & 0xff000000u;
  base += float_of(((exponent < 0x71000000u ? 0x71000000u : exponent) >> 1) + 0x07800000u);
  const std::uint32_t rounded = bits_of(base);
  const std::uint32_t magnitude = (rounded >> 13 & 0x7c00u) + (rounded & 0x0fffu);
  return {static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | (doubled > 0xff000000u ? 0x7e00u : magnitude))};
}

}  // namespace gptvq
