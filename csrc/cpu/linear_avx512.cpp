// AVX-512 with VBMI and VNNI.
#include "cpu/linear_kernel.h"

#if defined(__x86_64__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include "cpu/linear_avx512.h"

namespace gptvq {

LinearKernel linear_avx512(int code_bits, int dim, int planes, bool one_book, bool halves) {
  return kernels<Avx512<true>>(code_bits, dim, planes, one_book, halves);
}

}  // namespace gptvq
#endif
