// y = W x for packed weights on a GPU.  Pointers to tensors are device memory; kernels are queued on a stream, nothing waits or allocates.
#pragma once
#include <vector>

#include "cpu/dequantize.h"

namespace gptvq::cuda {

// How x is multiplied: as 16-bit or 8-bit integers, in float32, or with everything rounded to float16 (to compare with).
enum class Arithmetic { a16, a8, fp32, fp16 };

// One packed weight.  Refers to the buffers of `weight` and to `bias` (float32 [rows] or null).
class Linear {
 public:
  // Throws std::invalid_argument where a buffer is not aligned to 16 bytes.
  Linear(const Packed& weight, const Spec& spec, const float* bias);

  const Spec& spec() const { return spec_; }
  const Packed& weight() const { return weight_; }
  const float* bias() const { return bias_; }
  // Whether the integer kernels take this shape: strips of whole blocks of 32 columns, and rows of a tile that share a codebook (2D K64,
  // K256), in pairs (2D K16) or not at all (1D).  Others are computed in float32, whatever activations are asked for.
  bool fast() const { return fast_; }

 private:
  Packed weight_;
  Spec spec_;
  const float* bias_;
  bool fast_;
};

constexpr std::int64_t kMostTokens = 64;      // of a call

// Bytes of scratch memory that `linear` needs.
std::int64_t linear_scratch(const std::vector<const Linear*>& layers, std::int64_t tokens, Arithmetic arithmetic, int device);

// y[i] [tokens, rows of i] = x [tokens, cols] times the weight of each layer (all with the same cols) transposed, plus its bias;
// x and y of `type`, scratch aligned to 16 bytes.  The same bits on every call.
void linear(const std::vector<const Linear*>& layers, const void* x, OutType type, std::int64_t tokens, const std::vector<void*>& y,
            Arithmetic arithmetic, void* scratch, int device, std::uint64_t stream);

}  // namespace gptvq::cuda
