// What a block is made of: fibers and their stacks, meetings of lanes, shared arrays.  Included by emu_block.h.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__x86_64__)
extern "C" void gptvq_emu_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.weak gptvq_emu_switch
.type gptvq_emu_switch,@function
gptvq_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gptvq_emu_switch,.-gptvq_emu_switch
)");
#endif

namespace emu {

struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

// Where a device function was called from: as a default argument, here() names the caller's line.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& o) const { return line == o.line && !std::strcmp(file, o.file); }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

#define EMU_HERE emu::Site::here()

enum class State : std::uint8_t { run, barrier, collective, done };
enum class Order { forward, reverse, round_robin, random };

struct Fiber {
  dim3 tid;
  int linear = 0, lane = 0, warp = 0;
  State state = State::run;
  const char* what = "";              // what it waits in, and where
  Site site;
  std::uint32_t mask = 0;
  void* sp = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  struct Copy { void* to; int bytes; unsigned char data[16]; };
  std::vector<Copy> open;                       // cp.async not yet committed
  std::vector<std::vector<Copy>> committed;     // cp.async groups not yet waited for
};

// A meeting of the lanes of one mask: each deposits a value, all read all of them.
struct Meeting {
  static constexpr std::size_t kBytes = 64;
  using Values = unsigned char (*)[kBytes];
  std::uint32_t mask = 0, arrived = 0, generation = 0;
  const char* what = "";
  Site site;
  alignas(16) unsigned char values[2][32][kBytes];
};

class Stacks {
 public:
#ifdef EMU_ASAN
  static constexpr std::size_t kSize = 256 * 1024;
#else
  static constexpr std::size_t kSize = 64 * 1024;
#endif
  ~Stacks() { if (base_) munmap(base_, 1024 * kSize); }
  unsigned char* of(int thread) {
    if (!base_) {
      void* p = mmap(nullptr, 1024 * kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw Error("emu: no memory for the stacks of a block");
      base_ = static_cast<unsigned char*>(p);
    }
    return base_ + static_cast<std::size_t>(thread) * kSize;
  }
 private:
  unsigned char* base_ = nullptr;
};

// Shared memory: poisoned (NaN in every float format) for each block, with a canary behind it.
class SharedArray {
 public:
  static constexpr std::size_t kCanary = 64;
  explicit SharedArray(std::size_t bytes, const char* tag = "", Site site = {}) : tag(tag), site(site), bytes_(bytes),
      store_(bytes + kCanary + 128) {
    at_ = store_.data() + (128 - reinterpret_cast<std::uintptr_t>(store_.data()) % 128) % 128;
  }
  SharedArray(SharedArray&&) = default;
  ~SharedArray() { allow(); }
  void poison() {
    allow();
    std::memset(at_, 0xFF, bytes_);
    std::memset(at_ + bytes_, 0xA5, kCanary);
#ifdef EMU_ASAN
    __asan_poison_memory_region(at_ + (bytes_ + 7) / 8 * 8, kCanary - 8);
#endif
  }
  bool overrun() {
    allow();
    for (std::size_t i = 0; i < kCanary; ++i)
      if (at_[bytes_ + i] != 0xA5) return true;
    return false;
  }
  unsigned char* data() { return at_; }
  std::size_t bytes() const { return bytes_; }
  const char* tag;
  Site site;

 private:
  void allow() {
#ifdef EMU_ASAN
    if (!store_.empty()) __asan_unpoison_memory_region(at_, bytes_ + kCanary);
#endif
  }
  std::size_t bytes_;
  std::vector<unsigned char> store_;
  unsigned char* at_ = nullptr;
};

}  // namespace emu
