#include "cuda/linear_launch.cuh"

namespace gptvq::cuda {

template int tiles_per_cta<8, 2>(int);
template void launch_linear<8, 2>(const LinearLaunch&, int);
template int tiles_per_cta<8, 4>(int);
template void launch_linear<8, 4>(const LinearLaunch&, int);
template int tiles_per_cta<12, 4>(int);
template void launch_linear<12, 4>(const LinearLaunch&, int);

}  // namespace gptvq::cuda
