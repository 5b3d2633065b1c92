#include "cuda/linear_launch.cuh"

namespace gptvq::cuda {

template int tiles_per_cta<4, 2>(int);
template void launch_linear<4, 2>(const LinearLaunch&, int);
template int tiles_per_cta<6, 2>(int);
template void launch_linear<6, 2>(const LinearLaunch&, int);

}  // namespace gptvq::cuda
