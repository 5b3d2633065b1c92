// Matrix tiles of Intel's AMX.
#pragma once
#if defined(GPTVQ_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace gptvq {

enum class Tiles { bfloat16 = 22, int8 = 25 };      // bits of what the processor says it can multiply

// Whether this processor has them and the system lets this process use their registers: it does not where a thread's stack for
// signals is too small for them, and after it has, refuses such stacks (8 KB and less).
inline bool has_tiles(Tiles kind) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> static_cast<int>(kind) & 1)) return false;
  constexpr int kAskForPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
}

}  // namespace gptvq
#endif
