// GPTVQ_PER_ISA: compiles a function of portable vectors once per instruction set; the loader picks one.
#pragma once

// Sanitizers instrument the code by which the loader picks one, which runs before they are ready.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define GPTVQ_SANITIZED
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(GPTVQ_SANITIZED)
#define GPTVQ_PER_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(GPTVQ_SANITIZED)
#define GPTVQ_PER_ISA __attribute__((target_clones("avx512f", "avx2", "default")))       // older GCC cannot choose by level
#else
#define GPTVQ_PER_ISA
#endif
