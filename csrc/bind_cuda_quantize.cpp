// gptvq._C.cuda: solving: codebooks, columns, descent.
#include "bind.h"

namespace py = pybind11;

namespace gptvq {

void bind_cuda_quantize(py::module_&) {}

}  // namespace gptvq
