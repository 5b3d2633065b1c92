// Vectors of 16 lanes in GCC's portable form, and functions that are compiled once per instruction set.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string_view>

#define GPTVQ_INLINE inline __attribute__((always_inline))

// Defines `name`, a pointer to the version of a function for this processor.  `call` is its body: a call of an always-inlined
// template.  (target_clones would do the same, but GCC cuts its vectors into single lanes before it makes the clones.)
#if defined(__x86_64__) && defined(__GNUC__)
#define GPTVQ_PER_ISA(name, parameters, call)                                                                        \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))) void name##_avx512 parameters { call; } \
  __attribute__((target("avx2,fma,bmi2"))) void name##_avx2 parameters { call; }                                     \
  void name##_portable parameters { call; }                                                                          \
  const auto name = isa() == Isa::avx512 ? name##_avx512 : isa() == Isa::avx2 ? name##_avx2 : name##_portable;
#else
#define GPTVQ_PER_ISA(name, parameters, call)       \
  void name##_portable parameters { call; }         \
  constexpr auto name = name##_portable;
#endif

namespace gptvq {

enum class Isa { portable, avx2, avx512 };

// What GPTVQ_CPU was when the module was loaded.  Its names are those of the linear kernels, of which quantization goes by these:
// "avx512" (no matrix tiles), "avx2" and "scalar" (nothing beyond what the compiler assumes); a name this processor lacks means less.
inline std::string_view forced() {
  const char* name = std::getenv("GPTVQ_CPU");
  return name ? name : "";
}

inline Isa isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  const std::string_view most = forced();
  if (most == "scalar") return Isa::portable;
  if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Int __attribute__((vector_size(4 * kLanes)));

}  // namespace gptvq
