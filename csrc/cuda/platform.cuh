// The only file that knows whether nvcc or the host emulator (tests/cuda_emu) compiles the kernels.
//
// All inline PTX is here, each piece behind a function that the emulator has too (emu_ptx.h) and that tests/cuda_emu/test_ptx.py
// compares with its definition, on a GPU where there is one.  A kernel declares its shared memory with GPTVQ_SHARED(T, name, n) or
// GPTVQ_DYN_SMEM(T, name); a launcher starts with GPTVQ_DEVICE(device), which makes that device current until it returns, and launches
// with GPTVQ_LAUNCH(kernel, grid, block, dynamic bytes, stream, arguments...), which throws std::runtime_error where CUDA refuses.
#pragma once
#include <cstdint>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define GPTVQ_DYN_SMEM(T, name)                                  \
  extern __shared__ __align__(128) unsigned char gptvq_smem_[];  \
  T* name = reinterpret_cast<T*>(gptvq_smem_)
#define GPTVQ_SHARED(T, name, n) __shared__ T name[n]
#define GPTVQ_LAUNCH(kernel, grid, block, smem, stream, ...) gptvq::launch(#kernel, kernel, grid, block, smem, stream, __VA_ARGS__)
#define GPTVQ_DEVICE(device) const gptvq::DeviceGuard gptvq_device_guard_(device)

namespace gptvq {

// Reads the error away, so that the next call does not report it again.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": CUDA says: " + cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "the current device");
    if (before_ != device) check_cuda(cudaSetDevice(device), ("device " + std::to_string(device)).c_str());
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;
  bool changed_ = false;
};

inline int multiprocessors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "the number of multiprocessors");
  return count;
}

// Bytes that a thread block may have.
inline std::int64_t shared_memory(int device) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "the size of shared memory");
  return bytes;
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t dynamic_bytes, std::uint64_t stream, A&&... args) {
  if (dynamic_bytes > 16 * 1024)                // with up to 32 KB of static shared memory: a kernel has 48 KB unless it asks for more
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes)), name);
  kernel<<<grid, block, dynamic_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(static_cast<P>(args)...);
  check_cuda(cudaGetLastError(), name);
}

__device__ __forceinline__ std::uint32_t shared_address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }

// ---- copies from global to shared memory that the thread does not wait for
__device__ __forceinline__ void cp_async16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// The first `valid` bytes from memory, the rest zero; nothing is read past them.
__device__ __forceinline__ void cp_async16_zfill(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(valid) : "memory");
}
__device__ __forceinline__ void cp_async4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// ---- 8 x 8 matrices of 16 bits from shared memory: lane 8 i + r holds the address of row r of matrix i
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// ---- d [16, 8] += a [16, k] b [k, 8] by a warp
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k32_s8(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- single instructions
// Byte i of the result is byte (selector >> 4 i & 7) of b:a, or eight copies of its sign where bit 3 of the selector is set.
__device__ __forceinline__ std::uint32_t prmt(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  std::uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
// Any function of three bits: Table is its value at a = 0xF0, b = 0xCC, c = 0xAA.
template <int Table>
__device__ __forceinline__ std::uint32_t lop3(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return r;
}
__device__ __forceinline__ int lane_id() {
  int r;
  asm("mov.u32 %0, %%laneid;\n" : "=r"(r));
  return r;
}
// v, of which the compiler then knows nothing: a constant stays in a register, a product with 0 or 1 stays a product.
__device__ __forceinline__ std::uint32_t opaque(std::uint32_t v) {
  std::uint32_t r;
  asm("mov.b32 %0, %1;\n" : "=r"(r) : "r"(v));
  return r;
}
// from + count * bytes: one instruction of the multiplier.
template <class T>
__device__ __forceinline__ const T* ahead(const T* from, int count, int bytes) {
  const T* r;
  asm("mad.wide.s32 %0, %1, %2, %3;\n" : "=l"(r) : "r"(count), "r"(bytes), "l"(from));
  return r;
}
// What lies at an address in shared memory (`shared_address`), so that the address can be made up of bits.
using SharedAddress = std::uint32_t;
__device__ __forceinline__ std::uint32_t load_shared16(SharedAddress at) {
  std::uint32_t r;
  asm volatile("{ .reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h; }\n" : "=r"(r) : "r"(at) : "memory");
  return r;
}
// Memory that this kernel only reads, and reads once: past the L1.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_stream(const uint2* p) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
// Zeros unless `valid`.
__device__ __forceinline__ uint2 load_stream_if(bool valid, const uint2* p) {
  uint2 v;
  asm("{ .reg .pred q; setp.ne.b32 q, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0; @q ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2]; }\n"
      : "=&r"(v.x), "=&r"(v.y) : "l"(p), "r"(static_cast<int>(valid)));
  return v;
}
__device__ __forceinline__ std::uint32_t load_stream(const std::uint32_t* p) {
  std::uint32_t v;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];\n" : "=r"(v) : "l"(p));
  return v;
}

}  // namespace gptvq
#else
#include "cuda_emu.h"
#endif
