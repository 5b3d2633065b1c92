// One launch of the integer kernels, between linear.cu and the files that hold the kernels of a format each.
#pragma once
#include "cuda/linear_args.cuh"

namespace gptvq::cuda {

struct LinearLaunch {
  const Inputs& inputs;
  const LinearBatch& batch;
  int ctas, warps;                // of the kernel that multiplies
  std::uint64_t stream;
};

// Tiles of 16 rows that a CTA of the kernel for several tokens takes, where CTAs have no table.
template <int Bits, int Dim>
int tiles_per_cta(int grain);

// grain: columns whose sums are kept apart; 256 without block scales, else 64 or 16.
template <int Bits, int Dim>
void launch_linear(const LinearLaunch& launch, int grain);

// The same in float16; `inputs.planes` is for x.
template <int Bits, int Dim>
void launch_half(const LinearLaunch& launch);

}  // namespace gptvq::cuda
