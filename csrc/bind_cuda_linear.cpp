// gptvq._C.cuda: y = W x.
#include "bind.h"

namespace py = pybind11;

namespace gptvq {

void bind_cuda_linear(py::module_&) {}

}  // namespace gptvq
