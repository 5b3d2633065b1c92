#pragma once

namespace gptvq {

struct CudaInfo {
  int device_count = 0;
  int runtime = 0, driver = 0;    // as CUDA counts: 1000 major + 10 minor; 0 where unknown
  const char* why = "";           // why no device can be used; empty where one can
};

// Never throws: a machine without a driver or device is an answer.
CudaInfo cuda_info();

}  // namespace gptvq
