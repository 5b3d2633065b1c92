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
#include <utility>
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

// Null without a bias.
inline const float* checked_bias(const std::optional<Arg>& arg, std::int64_t rows) {
  if (!arg) return nullptr;
  const TensorArg bias = tensor(*arg);
  bias.require("bias", "float32", {rows});
  return bias.data<const float>();
}

// The layers of one call, all on x [tokens, cols]; Linear: of either kind.
template <class Linear>
void check_layers(const std::vector<const Linear*>& layers, std::int64_t tokens) {
  if (tokens < 0) throw std::invalid_argument("tokens: got " + std::to_string(tokens) + ", need 0 or more");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (!layers[i]) throw std::invalid_argument("layer " + std::to_string(i) + ": got None, need a Linear");
    const std::int64_t cols = layers[i]->spec().cols, need = layers[0]->spec().cols;
    if (cols != need)
      throw std::invalid_argument("layer " + std::to_string(i) + " has " + std::to_string(cols) + " columns, need " + std::to_string(need) +
                                  " as in layer 0");
  }
}

// The outputs of that call, from their addresses.
inline std::vector<void*> checked_outputs(const std::vector<std::uintptr_t>& y, std::size_t layers, std::uintptr_t x, std::int64_t tokens) {
  if (layers != y.size())
    throw std::invalid_argument("y: got " + std::to_string(y.size()) + " outputs, need " + std::to_string(layers) + ", one per layer");
  if (tokens > 0 && !x) throw std::invalid_argument("x: got a tensor without storage, need one with data");
  std::vector<void*> outputs;
  for (const std::uintptr_t address : y) {
    if (tokens > 0 && !address) throw std::invalid_argument("y: got a tensor without storage, need one with data");
    outputs.push_back(reinterpret_cast<void*>(address));
  }
  return outputs;
}

inline OutType float_type(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("type: got " + std::to_string(code) + ", need 0, 1 or 2");
  return static_cast<OutType>(code);
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
void bind_call(pybind11::module_& m);               // after bind_linear
void bind_quantize(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);               // the functions of gptvq._C.cuda; it calls the others
void bind_cuda_quantize(pybind11::module_& m);
void bind_cuda_linear(pybind11::module_& m);

}  // namespace gptvq
