#include "cuda/linear_half.cuh"
#include "cuda/linear_launch.h"

namespace gptvq::cuda {

template <int Bits, int Dim>
void launch_half(const LinearLaunch& a) {
  using F = LinearFormat<Bits, Dim>;
  const LinearLayer& w = a.batch.layer[0];
  const unsigned tokens = static_cast<unsigned>(a.batch.tokens);
  GPTVQ_LAUNCH((linear_half_inputs_kernel<F>), dim3(static_cast<unsigned>((w.chunks + kQuantizeWarps - 1) / kQuantizeWarps), tokens),
               dim3(32 * kQuantizeWarps), 0, a.stream, a.inputs, w);
  GPTVQ_LAUNCH((linear_half_kernel<F>), dim3(static_cast<unsigned>(a.ctas), (tokens + kHalfTokens - 1) / kHalfTokens),
               dim3(32u * static_cast<unsigned>(a.warps)), 0, a.stream, a.batch);
}

template void launch_half<2, 1>(const LinearLaunch&);
template void launch_half<3, 1>(const LinearLaunch&);
template void launch_half<4, 1>(const LinearLaunch&);
template void launch_half<4, 2>(const LinearLaunch&);
template void launch_half<6, 2>(const LinearLaunch&);
template void launch_half<8, 2>(const LinearLaunch&);
template void launch_half<8, 4>(const LinearLaunch&);
template void launch_half<12, 4>(const LinearLaunch&);

}  // namespace gptvq::cuda
