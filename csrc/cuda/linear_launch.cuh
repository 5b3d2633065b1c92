// The launches of linear_launch.h; included by the files that hold the kernels of some formats.
#pragma once
#include "cuda/linear_inputs.cuh"
#include "cuda/linear_launch.h"
#include "cuda/linear_tokens.cuh"

namespace gptvq::cuda {

template <class F, int Grain>
void launch_grain(const LinearLaunch& a) {
  const LinearBatch& b = a.batch;
  const LinearLayer& w = b.layer[0];
  const unsigned tokens = static_cast<unsigned>(b.tokens);
  const dim3 block(32u * static_cast<unsigned>(a.warps));
  const unsigned ctas = static_cast<unsigned>(a.ctas);
  GPTVQ_LAUNCH((linear_inputs_kernel<F, Grain>), dim3(static_cast<unsigned>((w.chunks + kQuantizeWarps - 1) / kQuantizeWarps), tokens),
               dim3(32 * kQuantizeWarps), 0, a.stream, a.inputs, w);
  if (b.tokens > 1 && Grain != 16) {
    if constexpr (Grain != 16) {
      const std::size_t bytes = sizeof(float) * 32 * a.warps * TokensShape<F, Grain>::slots * ((b.tokens + kTokenTile - 1) / kTokenTile);
      if constexpr (F::lookup == Lookup::cta_table)
        GPTVQ_LAUNCH((linear_group_tokens_kernel<F, Grain>), dim3(ctas), block, bytes, a.stream, b);
      else
        GPTVQ_LAUNCH((linear_tile_tokens_kernel<F, Grain>), dim3(ctas), block, bytes, a.stream, b);
    }
  } else if constexpr (F::lookup == Lookup::cta_table) {
    GPTVQ_LAUNCH((linear_group_kernel<F, Grain>), dim3(ctas, tokens), block, 0, a.stream, b);
  } else {
    GPTVQ_LAUNCH((linear_tile_kernel<F, Grain>), dim3(ctas, tokens), block, 0, a.stream, b);
  }
}

template <int Bits, int Dim>
int tiles_per_cta(int grain) {
  using F = LinearFormat<Bits, Dim>;
  return grain == 256 ? TokensShape<F, 256>::tiles : grain == 64 ? TokensShape<F, 64>::tiles : 1;
}

template <int Bits, int Dim>
void launch_linear(const LinearLaunch& launch, int grain) {
  using F = LinearFormat<Bits, Dim>;
  if (grain == 256) launch_grain<F, 256>(launch);
  else if (grain == 64) launch_grain<F, 64>(launch);
  else launch_grain<F, 16>(launch);
}

}  // namespace gptvq::cuda
