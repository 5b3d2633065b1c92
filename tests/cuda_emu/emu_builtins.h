// CUDA's built-in variables and device functions for the host.  Included by cuda_emu.h; one entry per function that a kernel uses.
#pragma once
#include <cmath>
#include <type_traits>

#include "emu_block.h"

#define threadIdx (emu::Block::current->me->tid)
#define blockIdx (emu::Block::current->id)
#define blockDim (emu::Block::current->block)
#define gridDim (emu::Block::current->grid)
#define warpSize 32

inline void __syncthreads(emu::Site at = EMU_HERE) { emu::Block::current->barrier(false, "__syncthreads", at); }
inline int __syncthreads_count(int p, emu::Site at = EMU_HERE) { return emu::Block::current->barrier(p != 0, "__syncthreads_count", at); }
inline int __syncthreads_or(int p, emu::Site at = EMU_HERE) { return emu::Block::current->barrier(p != 0, "__syncthreads_or", at) != 0; }
inline int __syncthreads_and(int p, emu::Site at = EMU_HERE) { return emu::Block::current->barrier(p == 0, "__syncthreads_and", at) == 0; }
inline void __syncwarp(std::uint32_t mask = 0xffffffffu, emu::Site at = EMU_HERE) {
  emu::Block::current->exchange(mask, nullptr, 0, "__syncwarp", at);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap() { emu::Block::current->fail("__trap"); }

// ---- warp collectives
namespace emu {
inline int lane() { return Block::current->me->lane; }

template <class T>
T shuffle(std::uint32_t mask, T value, int from, const char* what, Site at) {
  static_assert(sizeof(T) <= Meeting::kBytes && std::is_trivially_copyable_v<T>, "what a shuffle moves");
  const auto values = Block::current->exchange(mask, &value, sizeof(T), what, at);
  if (!(mask >> from & 1)) Block::current->fail(std::string(what) + ": lane " + std::to_string(from) + " is not in the mask", at);
  T r;
  std::memcpy(&r, values[from], sizeof(T));
  return r;
}

inline int segment(int width, const char* what, Site at) {
  if (width < 1 || width > 32 || (width & (width - 1))) Block::current->fail(std::string(what) + ": width " + std::to_string(width), at);
  return ~(width - 1);
}

// f over the values of all lanes of the mask.
template <class T, class F>
T reduce(std::uint32_t mask, T value, const char* what, Site at, F f) {
  const auto values = Block::current->exchange(mask, &value, sizeof(T), what, at);
  bool first = true;
  T r = value;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    T v;
    std::memcpy(&v, values[l], sizeof(T));
    r = first ? v : f(r, v);
    first = false;
  }
  return r;
}
}  // namespace emu

template <class T>
T __shfl_sync(std::uint32_t mask, T v, int from, int width = 32, emu::Site at = EMU_HERE) {
  const int l = emu::lane();
  return emu::shuffle(mask, v, (l & emu::segment(width, "__shfl_sync", at)) + (from & (width - 1)), "__shfl_sync", at);
}
template <class T>
T __shfl_xor_sync(std::uint32_t mask, T v, int x, int width = 32, emu::Site at = EMU_HERE) {
  const int l = emu::lane(), from = l ^ x, s = emu::segment(width, "__shfl_xor_sync", at);
  return emu::shuffle(mask, v, from > 31 || (from & s) > (l & s) ? l : from, "__shfl_xor_sync", at);
}
template <class T>
T __shfl_down_sync(std::uint32_t mask, T v, unsigned by, int width = 32, emu::Site at = EMU_HERE) {
  const int l = emu::lane(), s = emu::segment(width, "__shfl_down_sync", at), from = l + static_cast<int>(by);
  return emu::shuffle(mask, v, (from ^ l) & s ? l : from, "__shfl_down_sync", at);
}
template <class T>
T __shfl_up_sync(std::uint32_t mask, T v, unsigned by, int width = 32, emu::Site at = EMU_HERE) {
  const int l = emu::lane(), s = emu::segment(width, "__shfl_up_sync", at), from = l - static_cast<int>(by);
  return emu::shuffle(mask, v, from < (l & s) ? l : from, "__shfl_up_sync", at);
}
inline std::uint32_t __ballot_sync(std::uint32_t mask, int p, emu::Site at = EMU_HERE) {
  const std::uint32_t mine = p ? 1u << emu::lane() : 0u;
  return emu::reduce(mask, mine, "__ballot_sync", at, [](std::uint32_t a, std::uint32_t b) { return a | b; });
}
inline int __any_sync(std::uint32_t mask, int p, emu::Site at = EMU_HERE) {
  return emu::reduce(mask, static_cast<int>(p != 0), "__any_sync", at, [](int a, int b) { return a | b; });
}
inline int __all_sync(std::uint32_t mask, int p, emu::Site at = EMU_HERE) {
  return emu::reduce(mask, static_cast<int>(p != 0), "__all_sync", at, [](int a, int b) { return a & b; });
}
template <class T>
std::uint32_t __match_any_sync(std::uint32_t mask, T v, emu::Site at = EMU_HERE) {
  const auto values = emu::Block::current->exchange(mask, &v, sizeof(T), "__match_any_sync", at);
  std::uint32_t r = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1 && !std::memcmp(values[l], &v, sizeof(T))) r |= 1u << l;
  return r;
}
#define EMU_REDUCE(name, expression)                                                                                  \
  inline unsigned __reduce_##name##_sync(std::uint32_t mask, unsigned v, emu::Site at = EMU_HERE) {                   \
    return emu::reduce(mask, v, "__reduce_" #name "_sync", at, [](unsigned a, unsigned b) { return expression; });    \
  }
#define EMU_REDUCE_INT(name, expression)                                                                              \
  inline int __reduce_##name##_sync(std::uint32_t mask, int v, emu::Site at = EMU_HERE) {                             \
    return emu::reduce(mask, v, "__reduce_" #name "_sync", at, [](int a, int b) { return expression; });              \
  }
EMU_REDUCE(add, a + b)
EMU_REDUCE_INT(add, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
EMU_REDUCE(min, std::min(a, b))
EMU_REDUCE_INT(min, std::min(a, b))
EMU_REDUCE(max, std::max(a, b))
EMU_REDUCE_INT(max, std::max(a, b))
EMU_REDUCE(and, a & b)
EMU_REDUCE(or, a | b)
EMU_REDUCE(xor, a ^ b)
#undef EMU_REDUCE
#undef EMU_REDUCE_INT

// ---- atomics: one fiber runs at a time, so a plain read and write is one.  Integers only: sums of floats would depend on the order.
namespace emu {
template <class T, class F>
T atomic(T* p, F f) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics of 32- and 64-bit integers");
  const T old = *p;
  *p = f(old);
  return old;
}
template <class T>
using Same = std::common_type_t<T>;       // keeps a literal argument from deciding T
}  // namespace emu
template <class T> T atomicAdd(T* p, emu::Same<T> v) {
  using U = std::make_unsigned_t<T>;
  return emu::atomic(p, [v](T a) { return static_cast<T>(static_cast<U>(a) + static_cast<U>(v)); });
}
template <class T> T atomicSub(T* p, emu::Same<T> v) {
  using U = std::make_unsigned_t<T>;
  return emu::atomic(p, [v](T a) { return static_cast<T>(static_cast<U>(a) - static_cast<U>(v)); });
}
template <class T> T atomicMax(T* p, emu::Same<T> v) { return emu::atomic(p, [v](T a) { return std::max<T>(a, v); }); }
template <class T> T atomicMin(T* p, emu::Same<T> v) { return emu::atomic(p, [v](T a) { return std::min<T>(a, v); }); }
template <class T> T atomicAnd(T* p, emu::Same<T> v) { return emu::atomic(p, [v](T a) { return static_cast<T>(a & v); }); }
template <class T> T atomicOr(T* p, emu::Same<T> v) { return emu::atomic(p, [v](T a) { return static_cast<T>(a | v); }); }
template <class T> T atomicXor(T* p, emu::Same<T> v) { return emu::atomic(p, [v](T a) { return static_cast<T>(a ^ v); }); }
template <class T> T atomicExch(T* p, emu::Same<T> v) { return emu::atomic(p, [v](T) { return static_cast<T>(v); }); }
template <class T> T atomicCAS(T* p, emu::Same<T> old, emu::Same<T> v) {
  return emu::atomic(p, [old, v](T a) { return static_cast<T>(a == old ? v : a); });
}

// ---- loads: alignment is what the hardware would trap on
namespace emu {
template <class T>
T load(const T* p, const char* what, Site at) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T)) Block::current->fail(std::string(what) + ": misaligned address", at);
  return *p;
}
}  // namespace emu
template <class T> T __ldg(const T* p, emu::Site at = EMU_HERE) { return emu::load(p, "__ldg", at); }
template <class T> T __ldcs(const T* p, emu::Site at = EMU_HERE) { return emu::load(p, "__ldcs", at); }
template <class T> T __ldcg(const T* p, emu::Site at = EMU_HERE) { return emu::load(p, "__ldcg", at); }

// ---- integers
inline int __popc(std::uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline std::uint32_t __byte_perm(std::uint32_t x, std::uint32_t y, std::uint32_t s) {
  if (s & 0x8888u) emu::Block::current->fail("__byte_perm: a selector above 7; gptvq::prmt has signs");
  const std::uint64_t v = static_cast<std::uint64_t>(y) << 32 | x;
  std::uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<std::uint32_t>(v >> (8 * (s >> 4 * i & 7)) & 255) << 8 * i;
  return r;
}
inline int __dp4a(int a, int b, int c) {
  std::uint32_t r = static_cast<std::uint32_t>(c);
  for (int i = 0; i < 32; i += 8) r += static_cast<std::uint32_t>(static_cast<std::int8_t>(a >> i) * static_cast<std::int8_t>(b >> i));
  return static_cast<int>(r);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
inline std::uint32_t __funnelshift_r(std::uint32_t lo, std::uint32_t hi, std::uint32_t s) {
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(hi) << 32 | lo) >> (s & 31));
}
inline std::uint32_t __umulhi(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>(static_cast<std::uint64_t>(a) * b >> 32);
}
template <class T, class U> constexpr std::common_type_t<T, U> min(T a, U b) { return b < a ? b : a; }
template <class T, class U> constexpr std::common_type_t<T, U> max(T a, U b) { return a < b ? b : a; }

// ---- floats: the host is compiled without contraction, so these are exactly what they say
namespace emu {
template <class To, class From>
To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
}  // namespace emu
inline unsigned __float_as_uint(float v) { return emu::bits<unsigned>(v); }
inline int __float_as_int(float v) { return emu::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emu::bits<float>(v); }
inline float __int_as_float(int v) { return emu::bits<float>(v); }
inline long long __double_as_longlong(double v) { return emu::bits<long long>(v); }
inline double __longlong_as_double(long long v) { return emu::bits<double>(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __double2float_rn(double v) { return static_cast<float>(v); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
inline int __float2int_rn(float v) {
  return v != v ? 0 : v >= 2147483648.0f ? 2147483647 : v <= -2147483648.0f ? -2147483647 - 1 : static_cast<int>(std::nearbyint(v));
}
inline long long __float2ll_rn(float v) { return std::llrint(v); }
inline long long __double2ll_rn(double v) { return std::llrint(v); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }

// Only for the device in cuda_fp16.h and cuda_bf16.h: one rounding, through double.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)), __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) + __bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}
