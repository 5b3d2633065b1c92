// What the bindings share: how Python hands tensors over.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace gptvq {

using Dims = std::vector<std::int64_t>;
using Arg = std::tuple<std::uintptr_t, std::string, Dims, Dims>;   // address, dtype, shape, strides

inline TensorArg tensor(const Arg& a) { return {std::get<0>(a), std::get<1>(a), std::get<2>(a), std::get<3>(a)}; }

void bind_quantize(pybind11::module_& m);

}  // namespace gptvq
