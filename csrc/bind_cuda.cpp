// gptvq._C.cuda: a tensor is (address, dtype, shape, strides) and lies on `device`; kernels are queued on `stream`, nothing waits.
//
// What the host can see is checked here.  What only the device sees, the numbers in a tensor, no kernel trusts with an address.
#include "bind.h"

namespace py = pybind11;

namespace gptvq {

void bind_cuda(py::module_& m) {
  m.doc() = "Kernels of gptvq on NVIDIA GPUs; call them through gptvq.ops.";
  bind_cuda_quantize(m);
  bind_cuda_linear(m);
}

}  // namespace gptvq
