#pragma once
#include <memory>
#include <string>
#include <vector>

#include "cpu/dequantize.h"
#include "cpu/linear_args.h"

namespace gptvq {

enum class Activations { a16, a8, fp32 };

// Names of the instruction sets compiled into this module that this processor runs, best first; "scalar" is always there.
std::vector<std::string> instruction_sets();

// One packed weight as the kernels want it.  Refers to the buffers of `weight` and to `bias` (float32 [rows] or null).
class Linear {
 public:
  // Throws std::invalid_argument for an instruction set that is not in instruction_sets(); "" takes the best.
  Linear(const Packed& weight, const Spec& spec, const float* bias, const std::string& instruction_set);

  const Spec& spec() const { return spec_; }
  // Whether the integer kernels take this shape: groups of whole tiles, or so small that 4 rows' tables fill 16 entries, in strips
  // of whole blocks.  Others are computed in float32, whatever activations are asked for.
  bool fast() const { return kernels_ != nullptr; }
  // out [rows of the tiles [first, last), cols] = the weights, see dequantize(); the result does not depend on `threads`.
  void unpack(std::int64_t first, std::int64_t last, void* out, OutType type, int threads) const;

 private:
  friend struct LinearRun;
  Packed weight_;
  Spec spec_;
  const float* bias_;
  std::vector<std::uint16_t> gs_;
  LinearKernels kernels_ = nullptr, many_ = nullptr;
  std::int64_t many_from_ = 0;          // tokens from which on many_ is the faster one
  LinearArgs args_{};
};

// y[i] [tokens, rows of i] = x [tokens, cols] times the weight of each layer (all with the same cols) transposed, plus its bias;
// x and y of `type`.  The result does not depend on `threads`.
void linear(const std::vector<const Linear*>& layers, const void* x, OutType type, std::int64_t tokens, const std::vector<void*>& y,
            Activations activations, int threads);

}  // namespace gptvq
