#include "cuda/linear_launch.cuh"

namespace gptvq::cuda {

template int tiles_per_cta<2, 1>(int);
template void launch_linear<2, 1>(const LinearLaunch&, int);
template int tiles_per_cta<3, 1>(int);
template void launch_linear<3, 1>(const LinearLaunch&, int);
template int tiles_per_cta<4, 1>(int);
template void launch_linear<4, 1>(const LinearLaunch&, int);

}  // namespace gptvq::cuda
