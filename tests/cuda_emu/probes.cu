// One tiny kernel per wrapper of inline PTX in cuda/platform.cuh, and for the built-in functions the emulator defines.
//
// test_ptx.py compiles this file with nvcc where there is a GPU, and for the emulator everywhere, and compares both with definitions
// of its own.  A warp runs each: lane l reads in[l][..] and writes out[l][..], of as many words as the probe says.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/platform.cuh"

namespace {

using gptvq::cp_async_commit;
using gptvq::cp_async_wait;
using Words = std::uint32_t;

__global__ void probe_cp_async16(const Words* in, Words* out) {             // 4 -> 4: what lane 31 - l reads
  GPTVQ_SHARED(uint4, s, 32);
  const int l = threadIdx.x;
  gptvq::cp_async16(&s[l], in + 4 * l);
  gptvq::cp_async_wait_all();
  __syncthreads();
  reinterpret_cast<uint4*>(out)[l] = s[31 - l];
}

__global__ void probe_cp_async16_zfill(const Words* in, Words* out) {       // 4 -> 4: the first l % 17 bytes
  GPTVQ_SHARED(uint4, s, 32);
  const int l = threadIdx.x;
  gptvq::cp_async16_zfill(&s[l], in + 4 * l, l % 17);
  gptvq::cp_async_wait_all();
  __syncthreads();
  reinterpret_cast<uint4*>(out)[l] = s[l];
}

__global__ void probe_cp_async4(const Words* in, Words* out) {              // 4 -> 4: words 1 and 0 of two groups, then 3 and 2
  GPTVQ_SHARED(Words, s, 128);
  const int l = threadIdx.x;
  gptvq::cp_async4(&s[l], in + 4 * l + 1);
  gptvq::cp_async4(&s[32 + l], in + 4 * l);
  cp_async_commit();
  gptvq::cp_async4(&s[64 + l], in + 4 * l + 3);
  gptvq::cp_async4(&s[96 + l], in + 4 * l + 2);
  cp_async_commit();
  cp_async_wait<1>();
  out[4 * l] = s[l];
  out[4 * l + 1] = s[32 + l];
  cp_async_wait<0>();
  out[4 * l + 2] = s[64 + l];
  out[4 * l + 3] = s[96 + l];
}

__global__ void probe_ldmatrix_x4(const Words* in, Words* out) {            // 4 -> 4: row l % 8 of matrix l / 8 is in[l]
  GPTVQ_SHARED(uint4, s, 32);
  const int l = threadIdx.x;
  s[l] = reinterpret_cast<const uint4*>(in)[l];
  __syncthreads();
  Words r[4];
  gptvq::ldmatrix_x4(r, &s[l]);
  for (int i = 0; i < 4; ++i) out[4 * l + i] = r[i];
}

__global__ void probe_ldmatrix_x2(const Words* in, Words* out) {            // 4 -> 2
  GPTVQ_SHARED(uint4, s, 32);
  const int l = threadIdx.x;
  s[l] = reinterpret_cast<const uint4*>(in)[l];
  __syncthreads();
  Words r[2];
  gptvq::ldmatrix_x2(r, &s[l % 16]);
  for (int i = 0; i < 2; ++i) out[2 * l + i] = r[i];
}

template <class Sum, void Multiply(Sum (&)[4], const Words (&)[4], const Words (&)[2])>
__device__ void probe_mma(const Words* in, Words* out) {                    // 10 -> 4: a, b and d as the lane holds them
  const int l = threadIdx.x;
  Words a[4], b[2];
  Sum d[4];
  for (int i = 0; i < 4; ++i) a[i] = in[10 * l + i];
  for (int i = 0; i < 2; ++i) b[i] = in[10 * l + 4 + i];
  memcpy(d, in + 10 * l + 6, sizeof d);
  Multiply(d, a, b);
  memcpy(out + 4 * l, d, sizeof d);
}

__device__ void f16(float (&d)[4], const Words (&a)[4], const Words (&b)[2]) { gptvq::mma_m16n8k16(d, a, b); }
__device__ void bf16(float (&d)[4], const Words (&a)[4], const Words (&b)[2]) { gptvq::mma_m16n8k16_bf16(d, a, b); }
__device__ void s8(std::int32_t (&d)[4], const Words (&a)[4], const Words (&b)[2]) { gptvq::mma_m16n8k32_s8(d, a, b); }
__global__ void probe_mma_f16(const Words* in, Words* out) { probe_mma<float, f16>(in, out); }
__global__ void probe_mma_bf16(const Words* in, Words* out) { probe_mma<float, bf16>(in, out); }
__global__ void probe_mma_s8(const Words* in, Words* out) { probe_mma<std::int32_t, s8>(in, out); }

__global__ void probe_prmt(const Words* in, Words* out) {                   // 3 -> 1
  const int l = threadIdx.x;
  out[l] = gptvq::prmt(in[3 * l], in[3 * l + 1], in[3 * l + 2]);
}

__global__ void probe_lop3(const Words* in, Words* out) {                   // 3 -> 3: (a & b) | c, a ^ b ^ c, the majority
  const int l = threadIdx.x;
  const Words a = in[3 * l], b = in[3 * l + 1], c = in[3 * l + 2];
  out[3 * l] = gptvq::lop3<(0xF0 & 0xCC) | 0xAA>(a, b, c);
  out[3 * l + 1] = gptvq::lop3<0xF0 ^ 0xCC ^ 0xAA>(a, b, c);
  out[3 * l + 2] = gptvq::lop3<(0xF0 & 0xCC) | (0xF0 & 0xAA) | (0xCC & 0xAA)>(a, b, c);
}

__global__ void probe_load_stream(const Words* in, Words* out) {            // 8 -> 7
  const int l = threadIdx.x;
  const uint4 four = gptvq::load_stream(reinterpret_cast<const uint4*>(in + 8 * l));
  const uint2 two = gptvq::load_stream(reinterpret_cast<const uint2*>(in + 8 * l + 4));
  const Words values[7] = {four.x, four.y, four.z, four.w, two.x, two.y, gptvq::load_stream(in + 8 * l + 6)};
  for (int i = 0; i < 7; ++i) out[7 * l + i] = values[i];
}

__global__ void probe_load_stream_if(const Words* in, Words* out) {         // 2 -> 2: zeros on odd lanes
  const int l = threadIdx.x;
  const uint2 two = gptvq::load_stream_if(l % 2 == 0, reinterpret_cast<const uint2*>(in + 2 * l));
  out[2 * l] = two.x;
  out[2 * l + 1] = two.y;
}

__global__ void probe_addresses(const Words* in, Words* out) {              // 2 -> 4: lane, word, both halves of the neighbour's word
  GPTVQ_SHARED(Words, s, 32);
  const int l = threadIdx.x;
  s[l] = in[2 * l];
  __syncthreads();
  const gptvq::SharedAddress at = gptvq::shared_address(s + (l ^ 1));
  out[4 * l] = static_cast<Words>(gptvq::lane_id());
  out[4 * l + 1] = gptvq::opaque(*gptvq::ahead(in + 64, l - 32, 8));        // backwards from the end
  out[4 * l + 2] = gptvq::load_shared16(at);
  out[4 * l + 3] = gptvq::load_shared16(at + 2);
}

__global__ void probe_shuffles(const Words* in, Words* out) {               // 1 -> 5
  const int l = threadIdx.x;
  const Words all = 0xffffffffu, v = in[l];
  out[5 * l] = __shfl_sync(all, v, static_cast<int>(v % 32));
  out[5 * l + 1] = __shfl_sync(all, v, static_cast<int>(v % 32), 16);
  out[5 * l + 2] = __shfl_xor_sync(all, v, 5);
  out[5 * l + 3] = __shfl_down_sync(all, v, 3, 8);
  out[5 * l + 4] = __shfl_up_sync(all, v, 3, 8);
}

__global__ void probe_votes(const Words* in, Words* out) {                  // 1 -> 9
  const int l = threadIdx.x;
  const Words all = 0xffffffffu, v = in[l], half = l < 16 ? 0xffffu : 0xffff0000u;
  const int any = __any_sync(half, v % 16 == 0), every = __all_sync(half, v < 0x80000000u);
  const int most = __reduce_max_sync(all, static_cast<int>(v));
  const Words values[9] = {__ballot_sync(all, v & 1), static_cast<Words>(any), static_cast<Words>(every), __match_any_sync(all, v % 4),
                           __reduce_add_sync(all, v), __reduce_min_sync(half, v), static_cast<Words>(most), __reduce_or_sync(half, v),
                           __reduce_xor_sync(all, v)};
  for (int i = 0; i < 9; ++i) out[9 * l + i] = values[i];
}

__global__ void probe_integers(const Words* in, Words* out) {               // 3 -> 6
  const int l = threadIdx.x;
  const Words a = in[3 * l], b = in[3 * l + 1], c = in[3 * l + 2];
  const int dot = __dp4a(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c)), zeros = __clz(static_cast<int>(a >> (c & 31)));
  const Words values[6] = {__byte_perm(a, b, c & 0x7777u), static_cast<Words>(dot), __dp4a(a, b, c), __funnelshift_r(a, b, c),
                           __umulhi(a, b), static_cast<Words>(zeros)};
  for (int i = 0; i < 6; ++i) out[6 * l + i] = values[i];
}

__global__ void probe_atomics(const Words* in, Words* out) {                // 1 -> 5: what a warp leaves in shared memory
  GPTVQ_SHARED(Words, s, 4);
  GPTVQ_SHARED(unsigned long long, wide, 1);
  const int l = threadIdx.x;
  if (l == 0) {
    s[0] = s[2] = 0;
    s[1] = 0xffffffffu;
    s[3] = 7;
    wide[0] = 0;
  }
  __syncthreads();
  atomicAdd(&s[0], in[l]);
  atomicMin(&s[1], in[l]);
  atomicMax(&s[2], in[l]);
  atomicCAS(&s[3], 7u, 9u);
  atomicAdd(&wide[0], static_cast<unsigned long long>(in[l]));
  __syncthreads();
  const Words values[5] = {s[0], s[1], s[2], s[3], static_cast<Words>(wide[0] >> 32)};
  for (int i = 0; i < 5; ++i) out[5 * l + i] = values[i];
}

struct Probe { const char* name; void (*kernel)(const Words*, Words*); };
const Probe kProbes[] = {
    {"cp_async16", probe_cp_async16}, {"cp_async16_zfill", probe_cp_async16_zfill}, {"cp_async4", probe_cp_async4},
    {"ldmatrix_x4", probe_ldmatrix_x4}, {"ldmatrix_x2", probe_ldmatrix_x2}, {"mma_m16n8k16", probe_mma_f16},
    {"mma_m16n8k16_bf16", probe_mma_bf16}, {"mma_m16n8k32_s8", probe_mma_s8}, {"prmt", probe_prmt}, {"lop3", probe_lop3},
    {"load_stream", probe_load_stream}, {"load_stream_if", probe_load_stream_if}, {"addresses", probe_addresses},
    {"shuffles", probe_shuffles}, {"votes", probe_votes}, {"integers", probe_integers},
    {"atomics", probe_atomics}};

}  // namespace

// "" or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* gptvq_probe(const char* name, const Words* in, Words* out,
                                                                          std::uint64_t stream) {
  static std::string error;
  error = std::string("no probe is called ") + name;
  for (const Probe& p : kProbes) {
    if (std::strcmp(p.name, name)) continue;
    error.clear();
    try {
      GPTVQ_LAUNCH(p.kernel, dim3(1), dim3(32), 0, stream, in, out);
    } catch (const std::exception& e) {
      error = e.what();
    }
  }
  return error.c_str();
}
