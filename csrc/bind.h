// What the binding files share: tensors and specs as Python passes them.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "cpu/dequantize.h"

namespace gptvq {

using Dims = std::vector<std::int64_t>;
using Arg = std::tuple<std::uintptr_t, std::string, Dims, Dims>;    // address, dtype, shape, strides
using SpecArg = std::array<std::int64_t, 7>;                        // the fields of Spec, in order

inline TensorArg tensor(const Arg& a) { return {std::get<0>(a), std::get<1>(a), std::get<2>(a), std::get<3>(a)}; }

inline TensorArg tensor(const char* name, const std::optional<Arg>& a) {
  if (!a) throw std::invalid_argument(std::string(name) + ": got None, need a tensor because the spec has block scales");
  return tensor(*a);
}

// For what a kernel reads several numbers at a time.
inline void require_alignment(const char* name, const TensorArg& t, std::int64_t bytes) {
  if (t.address % static_cast<std::uintptr_t>(bytes))
    throw std::invalid_argument(std::string(name) + ": got an address that is not a multiple of " + std::to_string(bytes) +
                                " bytes, need one (a copy has it)");
}

inline Spec checked_spec(const SpecArg& f) {
  const Spec spec{f[0], f[1], f[2], f[3], f[4], f[5], f[6]};
  spec.check();
  return spec;
}

inline OutType float_type(const char* name, const std::string& dtype) {
  if (dtype == "float32") return OutType::float32;
  if (dtype == "float16") return OutType::float16;
  if (dtype == "bfloat16") return OutType::bfloat16;
  throw std::invalid_argument(std::string(name) + ": got " + dtype + ", need float32, float16 or bfloat16");
}

// The buffers of a packed weight, each checked against the spec.
inline Packed checked_weight(const Arg& idx_arg, const Arg& cb_arg, const Arg& gs_arg, const std::optional<Arg>& sc_arg,
                             const std::optional<Arg>& table_arg, const Spec& s) {
  const TensorArg idx = tensor(idx_arg), cb = tensor(cb_arg), gs = tensor(gs_arg);
  idx.require("idx", "uint8", {s.tiles(), s.blocks(), s.block_bytes()});
  cb.require("cb", "int8", {s.row_groups(), s.strips(), s.dim, s.codewords()});
  gs.require("gs", "bfloat16", {s.row_groups(), s.strips()});
  Packed weight{idx.data<const std::uint8_t>(), cb.data<const std::int8_t>(), gs.data<const std::uint16_t>(), nullptr, nullptr};
  if (s.scale_block) {
    const TensorArg sc = tensor("sc", sc_arg), table = tensor("scale table", table_arg);
    sc.require("sc", "uint8", {s.tiles(), Spec::ceil_div(s.scale_blocks(), 2), Spec::tile_rows});
    table.require("scale table", "float32", {s.scale_blocks(), 16});
    weight.sc = sc.data<const std::uint8_t>();
    weight.scale_table = table.data<const float>();
  } else if (sc_arg || table_arg) {
    throw std::invalid_argument("sc, scale table: got tensors, need None because the spec has no block scales");
  }
  return weight;
}

// Calls f while other Python threads run.  pybind11::gil_scoped_release takes the interpreter back in its destructor, which may not
// be left the way Python leaves it where the interpreter has meanwhile ended: by ending the (daemon) thread.
template <class F>
void without_gil(F&& f) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    f();
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
}

void bind_linear(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);               // the functions of gptvq._C.cuda; it calls the others
void bind_cuda_quantize(pybind11::module_& m);
void bind_cuda_linear(pybind11::module_& m);

}  // namespace gptvq
