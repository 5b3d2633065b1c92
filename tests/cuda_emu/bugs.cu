// Kernels with one mistake each, which the emulator has to notice; test_emulator.py says how.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/platform.cuh"

namespace {

// y[b] = the sum of x[64 b ..]: right with bug 0.
enum Bug { none, no_barrier, barrier_in_branch, lane_outside_mask, source_outside_mask, two_collectives, early_return };

template <int Which>
__global__ void block_sum(const float* x, float* y) {
  GPTVQ_SHARED(float, part, 2);
  float v = x[64 * blockIdx.x + threadIdx.x];
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  if (Which == early_return && threadIdx.x > 40) return;
  if (Which != no_barrier) __syncthreads();
  if (Which == barrier_in_branch && threadIdx.x < 32) __syncthreads();
  if (Which == two_collectives && (threadIdx.x % 2 ? __any_sync(0xffffffffu, 1) : __all_sync(0xffffffffu, 1)) < 0) return;
  if (threadIdx.x < 32) {
    v = threadIdx.x < 2 ? part[threadIdx.x] : 0.0f;
    const std::uint32_t mask = Which == lane_outside_mask ? 0xffffu : 0xffffffffu;
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(mask, v, o);
    if (Which == source_outside_mask && threadIdx.x < 16) v = __shfl_sync(0xffffu, v, 20);
    if (threadIdx.x == 0) y[blockIdx.x] = v;
  }
}

__global__ void no_wait(const float* x, float* y) {
  GPTVQ_DYN_SMEM(float4, s);
  gptvq::cp_async16(&s[threadIdx.x], x + 4 * (threadIdx.x % 16));
  gptvq::cp_async_commit();
  __syncthreads();
  if (threadIdx.x < 2) y[threadIdx.x] = s[threadIdx.x].x;
}

__global__ void dynamic_overrun(const float* x, float* y) {
  GPTVQ_DYN_SMEM(float, s);
  s[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 2) y[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void static_overrun(const float* x, float* y) {
  GPTVQ_SHARED(float, s, 64);
  float* p = s;
  p[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 2) y[threadIdx.x] = p[threadIdx.x + 1];
}

__global__ void unwritten(const float* x, float* y) {
  GPTVQ_SHARED(float, s, 64);
  if (threadIdx.x) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 2) y[threadIdx.x] = s[threadIdx.x];
}

__global__ void misaligned(const float* x, float* y) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(x + threadIdx.x % 2));
  if (threadIdx.x < 2) y[threadIdx.x] = v.x;
}

// Reads x[128]: behind the 128 floats that it gets.  Only an address sanitizer sees it.
__global__ void global_overrun(const float* x, float* y) {
  if (threadIdx.x < 2) y[threadIdx.x] = x[127 + threadIdx.x];
}

// All threads of a block write one word: the last one wins, whoever that is.
__global__ void race(const float* x, float* y) { y[blockIdx.x] = x[threadIdx.x]; }

__global__ void idle(const float*, float*) {}

struct Case { const char* name; void (*kernel)(const float*, float*); std::size_t dynamic_bytes; unsigned threads; };
const Case kCases[] = {
    {"none", block_sum<none>, 0, 64},
    {"no barrier", block_sum<no_barrier>, 0, 64},
    {"barrier in branch", block_sum<barrier_in_branch>, 0, 64},
    {"lane outside mask", block_sum<lane_outside_mask>, 0, 64},
    {"source outside mask", block_sum<source_outside_mask>, 0, 64},
    {"two collectives", block_sum<two_collectives>, 0, 64},
    {"early return", block_sum<early_return>, 0, 64},
    {"no wait", no_wait, 1024, 64},
    {"dynamic overrun", dynamic_overrun, 256, 64},
    {"static overrun", static_overrun, 0, 64},
    {"unwritten", unwritten, 0, 64},
    {"misaligned", misaligned, 0, 64},
    {"global overrun", global_overrun, 0, 64},
    {"race", race, 0, 64},
    {"too many threads", idle, 0, 1056},
    {"too much shared memory", idle, 228 * 1024, 64}};

}  // namespace

// Two blocks of x [128] -> y [2]; "" or what the emulator says.
extern "C" __attribute__((visibility("default"))) const char* gptvq_bug(const char* name, const float* x, float* y) {
  static std::string error;
  error = std::string("no bug is called ") + name;
  for (const Case& c : kCases) {
    if (std::strcmp(c.name, name)) continue;
    error.clear();
    try {
      GPTVQ_LAUNCH(c.kernel, dim3(2), dim3(c.threads), c.dynamic_bytes, 0, x, y);
    } catch (const std::exception& e) {
      error = e.what();
    }
  }
  return error.c_str();
}
