// AVX-512 with VBMI, VNNI and GFNI, which all processors with the first two have.
#include "cpu/linear_kernel.h"

#if defined(__x86_64__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__GFNI__)
#include "cpu/linear_avx512.h"
#include "cpu/linear_unpack.h"

namespace gptvq {

LinearKernel linear_avx512(int code_bits, int dim, int planes, bool one_book, bool halves) {
  LinearKernel kernel = kernels<Avx512<true>>(code_bits, dim, planes, one_book, halves);
  kernel.unpack = with_codes<decltype(kernel.unpack)>(code_bits, dim, [&](auto codes) {
    using C = decltype(codes);
    if constexpr (C::k <= 16) return one_book ? unpack_tiles<C, true> : unpack_tiles<C, false>;
    else return unpack_tiles<C, true>;
  });
  return kernel;
}

}  // namespace gptvq
#endif
