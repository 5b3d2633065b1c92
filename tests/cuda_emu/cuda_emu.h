// Runs CUDA C++ kernels on the host, one fiber per CUDA thread, so that tests need no GPU.
//
// What it is: a functional model.  Barriers, warp collectives with masks, static and dynamic shared memory, integer atomics, cp.async
// (copies land only at the wait, as late as the hardware may let them), ldmatrix and the matrix multiplications of emu_ptx.h.
// What it checks on top: barrier divergence and deadlock, lanes outside masks, different collectives under one mask, shared memory
// read before it is written (poisoned) or written past its end, the limits of a launch, alignment of vector copies; and, by running one
// launch in several thread orders, missing barriers.  With -fsanitize=address,undefined also every access out of bounds.
// What it is not: a model of time, of memory order between blocks (which run one after the other), of wgmma, TMA or clusters.
//
// Half, bfloat16 and their arithmetic are NVIDIA's own: cuda_fp16.h compiles under g++.
#pragma once
#ifdef __CUDACC__
#error "cuda_emu.h is for the host compiler"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include "emu_block.h"

#include <tuple>

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#undef __noinline__
#define __shared__ use_GPTVQ_SHARED_or_GPTVQ_DYN_SMEM
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))

#include "emu_builtins.h"
#include "emu_ptx.h"

namespace emu {

struct Options { Order order = Order::forward; std::uint64_t seed = 1; };
inline Options& options() {
  static Options o;
  return o;
}

struct Stats { long launches = 0, blocks = 0, threads = 0, switches = 0; };
inline Stats& stats() {
  static Stats s;
  return s;
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t dynamic_bytes, A&&... args) {
  const std::string what = std::string("emu: ") + name + ": ";
  if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    throw Error(what + "grid (" + std::to_string(grid.x) + "," + std::to_string(grid.y) + "," + std::to_string(grid.z) + ")");
  const long threads = static_cast<long>(block.x) * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64) throw Error(what + std::to_string(threads) + " threads in a block");
  if (static_cast<long>(dynamic_bytes) > shared_limit())
    throw Error(what + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory (most: " + std::to_string(shared_limit()) + ")");
  Block b(grid, block, dynamic_bytes, options().order, options().seed);
  std::tuple<P...> values(static_cast<P>(args)...);
  const std::function<void()> body = [&] { std::apply(kernel, values); };
  const std::uint64_t blocks = static_cast<std::uint64_t>(grid.x) * grid.y * grid.z;
  for (std::uint64_t i = 0; i < blocks; ++i) {
    const std::uint64_t k = options().order == Order::reverse ? blocks - 1 - i : i;
    b.run(dim3(static_cast<unsigned>(k % grid.x), static_cast<unsigned>(k / grid.x % grid.y),
               static_cast<unsigned>(k / (static_cast<std::uint64_t>(grid.x) * grid.y))), body);
  }
  Stats& s = stats();
  ++s.launches;
  s.blocks += static_cast<long>(blocks);
  s.threads += static_cast<long>(blocks) * threads;
  s.switches += b.switches;
}

}  // namespace emu

#define GPTVQ_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(emu::Block::current->dynamic_memory())
#define GPTVQ_SHARED(T, name, n) \
  T(&name)[n] = *reinterpret_cast<T(*)[n]>(emu::Block::current->static_memory(#name, sizeof(T) * (n), EMU_HERE))
#define GPTVQ_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ((void)(stream), emu::launch(#kernel, kernel, grid, block, smem, __VA_ARGS__))
#define GPTVQ_DEVICE(device) (void)(device)
