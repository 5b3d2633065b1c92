// The wrappers of inline PTX in csrc/cuda/platform.cuh, defined for the host by the PTX ISA.  Included by cuda_emu.h.
#pragma once
#include "emu_builtins.h"

namespace gptvq {

inline int multiprocessors(int) { return 4; }
inline std::int64_t shared_memory(int) { return emu::shared_limit(); }

// ---- cp.async: a copy is kept aside and lands at the wait, so that a missing wait reads poison
namespace emulated {
inline void copy(void* to, const void* from, int bytes, int valid, emu::Site at) {
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % static_cast<unsigned>(bytes))
    emu::Block::current->fail("cp.async of " + std::to_string(bytes) + " bytes: misaligned address", at);
  if (valid < 0 || valid > bytes) emu::Block::current->fail("cp.async: " + std::to_string(valid) + " valid bytes", at);
  emu::Fiber::Copy c{to, bytes, {}};
  std::memcpy(c.data, from, static_cast<std::size_t>(valid));
  emu::Block::current->me->open.push_back(c);
}
}  // namespace emulated

inline void cp_async16(void* to, const void* from, emu::Site at = EMU_HERE) { emulated::copy(to, from, 16, 16, at); }
inline void cp_async16_zfill(void* to, const void* from, int valid, emu::Site at = EMU_HERE) { emulated::copy(to, from, 16, valid, at); }
inline void cp_async4(void* to, const void* from, emu::Site at = EMU_HERE) { emulated::copy(to, from, 4, 4, at); }
inline void cp_async_commit() {
  emu::Fiber* f = emu::Block::current->me;
  f->committed.push_back(std::move(f->open));
  f->open.clear();
}
template <int N>
void cp_async_wait() {
  emu::Fiber* f = emu::Block::current->me;
  while (static_cast<int>(f->committed.size()) > N) {
    for (const auto& c : f->committed.front()) std::memcpy(c.to, c.data, static_cast<std::size_t>(c.bytes));
    f->committed.erase(f->committed.begin());
  }
}
inline void cp_async_wait_all() {
  cp_async_commit();
  cp_async_wait<0>();
}

// ---- matrices from shared memory: lane 8 i + r holds the address of row r of matrix i
namespace emulated {
template <int N>
void ldmatrix(std::uint32_t (&r)[N], const void* row, const char* what, emu::Site at) {
  const int l = emu::lane();
  unsigned char value[16] = {};
  if (l < 8 * N) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16) emu::Block::current->fail(std::string(what) + ": misaligned row", at);
    std::memcpy(value, row, 16);
  }
  const auto rows = emu::Block::current->exchange(0xffffffffu, value, 16, what, at);
  for (int i = 0; i < N; ++i) std::memcpy(&r[i], rows[i * 8 + l / 4] + l % 4 * 4, 4);
}
}  // namespace emulated

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, emu::Site at = EMU_HERE) { emulated::ldmatrix(r, row, "ldmatrix.x4", at); }
inline void ldmatrix_x2(std::uint32_t (&r)[2], const void* row, emu::Site at = EMU_HERE) { emulated::ldmatrix(r, row, "ldmatrix.x2", at); }

// ---- matrix multiplications of a warp, d += a b, with the registers' layout of the PTX ISA
namespace emulated {
struct Fragments { std::uint32_t a[4], b[2]; };

// element(lane, register, byte offset in it) -> value; a [16, K] row-major, b [K, 8] column-major, `per` elements in a register.
template <int K, class Sum, class Element>
void mma(Sum (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const char* what, emu::Site at, Element element) {
  constexpr int per = K / 8;
  Fragments mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const auto all = emu::Block::current->exchange(0xffffffffu, &mine, sizeof mine, what, at);
  const auto A = [&](int row, int k) {
    return element(all[row % 8 * 4 + k % (4 * per) / per] + 4 * (row / 8 + 2 * (k / (4 * per))), k % per);
  };
  const auto B = [&](int k, int col) { return element(all[col * 4 + k % (4 * per) / per] + 16 + 4 * (k / (4 * per)), k % per); };
  const int l = emu::lane();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < K; ++k) d[i] += A(l / 4 + i / 2 * 8, k) * B(k, l % 4 * 2 + i % 2);
}
}  // namespace emulated

inline void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], emu::Site at = EMU_HERE) {
  emulated::mma<16>(d, a, b, "mma.m16n8k16.f16", at, [](const unsigned char* reg, int i) {
    __half_raw h;
    std::memcpy(&h.x, reg + 2 * i, 2);
    return __half2float(__half(h));
  });
}
inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], emu::Site at = EMU_HERE) {
  emulated::mma<16>(d, a, b, "mma.m16n8k16.bf16", at, [](const unsigned char* reg, int i) {
    std::uint32_t bits = static_cast<std::uint32_t>(reg[2 * i]) << 16 | static_cast<std::uint32_t>(reg[2 * i + 1]) << 24;
    return emu::bits<float>(bits);
  });
}
inline void mma_m16n8k32_s8(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], emu::Site at = EMU_HERE) {
  emulated::mma<32>(d, a, b, "mma.m16n8k32.s8", at,
                    [](const unsigned char* reg, int i) { return static_cast<int>(static_cast<std::int8_t>(reg[i])); });
}

// ---- single instructions
inline std::uint32_t prmt(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t v = static_cast<std::uint64_t>(b) << 32 | a;
  std::uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t s = selector >> 4 * i & 15;
    std::uint32_t byte = static_cast<std::uint32_t>(v >> (8 * (s & 7)) & 255);
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}
template <int Table>
std::uint32_t lop3(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t r = 0;
  for (int i = 0; i < 8; ++i)
    if (Table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
inline int lane_id() { return emu::lane(); }
inline std::uint32_t opaque(std::uint32_t v) { return v; }
template <class T>
const T* ahead(const T* from, int count, int bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + static_cast<std::int64_t>(count) * bytes);
}
using SharedAddress = std::uintptr_t;
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<SharedAddress>(p); }
inline std::uint32_t load_shared16(SharedAddress at) { return *reinterpret_cast<const std::uint16_t*>(at); }
inline uint2 load_stream_if(bool valid, const uint2* p, emu::Site at = EMU_HERE) {
  return valid ? emu::load(p, "load_stream_if", at) : make_uint2(0, 0);
}
inline uint4 load_stream(const uint4* p, emu::Site at = EMU_HERE) { return emu::load(p, "load_stream", at); }
inline uint2 load_stream(const uint2* p, emu::Site at = EMU_HERE) { return emu::load(p, "load_stream", at); }
inline std::uint32_t load_stream(const std::uint32_t* p, emu::Site at = EMU_HERE) { return emu::load(p, "load_stream", at); }

}  // namespace gptvq
