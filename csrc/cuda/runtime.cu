// Device management; the CUDA runtime is linked statically, so the module imports where there is no NVIDIA driver.
#include <cuda_runtime.h>

#include "cuda/runtime.h"

namespace gptvq {

CudaInfo cuda_info() {
  CudaInfo info;
  cudaRuntimeGetVersion(&info.runtime);
  cudaDriverGetVersion(&info.driver);
  const cudaError_t error = cudaGetDeviceCount(&info.device_count);
  if (error != cudaSuccess) {
    cudaGetLastError();           // clears it, or the next kernel launch would report it
    info.device_count = 0;
    info.why = cudaGetErrorString(error);
  } else if (info.device_count == 0) {
    info.why = "the driver reports no CUDA device";
  }
  return info;
}

}  // namespace gptvq
