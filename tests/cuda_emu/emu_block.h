// A block of CUDA threads, one fiber each, and their scheduler.  Included by cuda_emu.h.
#pragma once
#include <algorithm>
#include <functional>
#include <map>

#include "emu_fibers.h"

namespace emu {

// Bytes of shared memory that a block may have.
inline long& shared_limit() {
  static long bytes = 227 * 1024;
  return bytes;
}

class Block {
 public:
  static thread_local Block* current;
  dim3 grid, block, id;
  Fiber* me = nullptr;
  long switches = 0;

  Block(dim3 grid, dim3 block, std::size_t dynamic_bytes, Order order, std::uint64_t seed)
      : grid(grid), block(block), n_(static_cast<int>(block.x * block.y * block.z)), order_(order), random_(seed * 2 + 1),
        dynamic_(dynamic_bytes), fibers_(static_cast<std::size_t>(n_)), meetings_(static_cast<std::size_t>(warps())) {}

  void run(dim3 block_id, const std::function<void()>& body) {
    id = block_id;
    body_ = &body;
    error_.clear();
    done_ = votes_ = 0;
    dynamic_.poison();
    for (SharedArray& s : statics_) s.poison();
    for (auto& m : meetings_) m.clear();
    int i = 0;
    for (unsigned z = 0; z < block.z; ++z)
      for (unsigned y = 0; y < block.y; ++y)
        for (unsigned x = 0; x < block.x; ++x, ++i) start(i, dim3(x, y, z));
    Block* before = current;
    current = this;
    schedule();
    current = before;
    if (error_.empty() && dynamic_.overrun()) error_ = "write past the end of dynamic shared memory";
    for (SharedArray& s : statics_)
      if (s.overrun() && error_.empty()) error_ = std::string("write past the end of ") + s.tag + " (" + s.site.text() + ")";
    if (!error_.empty())
      throw Error("emu: block (" + std::to_string(id.x) + "," + std::to_string(id.y) + "," + std::to_string(id.z) + "): " + error_);
  }

  // ---- called from fibers
  unsigned char* dynamic_memory() { return dynamic_.data(); }

  unsigned char* static_memory(const char* tag, std::size_t bytes, Site site) {
    for (SharedArray& s : statics_)
      if (s.site == site && !std::strcmp(s.tag, tag)) return s.data();
    statics_.emplace_back(bytes, tag, site);
    statics_.back().poison();
    std::size_t total = 0;
    for (const SharedArray& s : statics_) total += s.bytes();
    if (total > 48 * 1024) fail("more than 48 KB of static shared memory");
    if (static_cast<long>(total + dynamic_.bytes()) > shared_limit()) fail("more shared memory than a block may have");
    return statics_.back().data();
  }

  [[noreturn]] void fail(const std::string& text, Site site = {}) {
    if (error_.empty())
      error_ = "thread " + std::to_string(me->linear) + ": " + text + (site.line ? " (" + site.text() + ")" : "");
    for (;;) yield();                 // never resumed: the block ends at the first error
  }

  int barrier(bool vote, const char* what, Site site) {
    votes_ += vote;
    me->state = State::barrier;
    me->what = what;
    me->site = site;
    yield();
    return result_;
  }

  // Deposits `bytes` of a value, waits for every lane of the mask, returns the deposits of the warp.
  Meeting::Values exchange(std::uint32_t mask, const void* value, std::size_t bytes, const char* what, Site site) {
    Fiber* f = me;
    if (!(mask >> f->lane & 1)) fail(std::string(what) + ": the calling lane is not in its mask", site);
    const int live = std::min(32, n_ - f->warp * 32);
    if (live < 32) mask &= (1u << live) - 1;
    Meeting& m = meeting(f->warp, mask);
    if (!m.arrived) {
      m.what = what;
      m.site = site;
    } else if (std::strcmp(m.what, what)) {
      fail(std::string("lanes of one mask meet in ") + m.what + " (" + m.site.text() + ") and in " + what, site);
    }
    const std::uint32_t turn = m.generation & 1;
    if (bytes) std::memcpy(m.values[turn][f->lane], value, bytes);
    m.arrived |= 1u << f->lane;
    if (m.arrived == mask) {
      m.arrived = 0;
      ++m.generation;
      for (int l = 0; l < live; ++l) {
        Fiber& o = fibers_[static_cast<std::size_t>(f->warp * 32 + l)];
        if (o.state == State::collective && o.mask == mask) o.state = State::run;
      }
    } else {
      f->state = State::collective;
      f->mask = mask;
      f->what = what;
      f->site = site;
      yield();
    }
    return meeting(f->warp, mask).values[turn];
  }

 private:
  int n_, done_ = 0, votes_ = 0, result_ = 0;
  Order order_;
  std::uint64_t random_;
  SharedArray dynamic_;
  std::vector<SharedArray> statics_;
  std::vector<Fiber> fibers_;
  std::vector<std::vector<Meeting>> meetings_;    // of each warp, one for every mask in use
  const std::function<void()>* body_ = nullptr;
  std::string error_;
#if defined(__x86_64__)
  void* scheduler_ = nullptr;
#else
  ucontext_t scheduler_;
#endif
#ifdef EMU_ASAN
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_stack_size_ = 0;
#endif

  int warps() const { return (n_ + 31) / 32; }

  std::uint64_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_;
  }

  Meeting& meeting(int warp, std::uint32_t mask) {
    auto& known = meetings_[static_cast<std::size_t>(warp)];
    for (Meeting& m : known)
      if (m.mask == mask) return m;
    known.emplace_back();
    known.back().mask = mask;
    return known.back();
  }

  void start(int i, dim3 tid) {
    Fiber& f = fibers_[static_cast<std::size_t>(i)];
    f.tid = tid;
    f.linear = i;
    f.lane = i & 31;
    f.warp = i / 32;
    f.state = State::run;
    f.open.clear();
    f.committed.clear();
    prepare(f);
  }

  void schedule() {
    std::vector<int> order(static_cast<std::size_t>(warps()));
    for (std::size_t k = 0; k < order.size(); ++k)
      order[k] = static_cast<int>(order_ == Order::reverse ? order.size() - 1 - k : k);
    while (done_ < n_ && error_.empty()) {
      if (order_ == Order::random)
        for (std::size_t k = order.size() - 1; k > 0; --k) std::swap(order[k], order[random() % (k + 1)]);
      bool ran = false;
      for (std::size_t k = 0; k < order.size() && error_.empty(); ++k) ran |= run_warp(order[k]);
      if (!ran && error_.empty() && done_ < n_ && !release_barrier()) error_ = deadlock();
    }
  }

  // Forward and reverse run one warp until nothing in it can move, so that warps drift as far apart as the barriers let them (a
  // missing barrier shows); round robin keeps them in step; random stops after a random number of steps.
  bool run_warp(int warp) {
    const int first = warp * 32, n = std::min(n_ - first, 32);
    bool any = false, ran = true;
    std::uint64_t left = order_ == Order::random ? 1 + random() % 256 : ~0ull;
    if (order_ == Order::round_robin) left = static_cast<std::uint64_t>(n);
    while (ran && left) {
      ran = false;
      const int turn = order_ == Order::random ? static_cast<int>(random() % static_cast<std::uint64_t>(n)) : 0;
      for (int k = 0; k < n && left; ++k) {
        Fiber& f = fibers_[static_cast<std::size_t>(first + (order_ == Order::reverse ? n - 1 - k : (k + turn) % n))];
        if (f.state != State::run) continue;
        any = ran = true;
        --left;
        me = &f;
        resume(f);
        if (!error_.empty()) return true;
        if (f.state == State::done) ++done_;
      }
    }
    return any;
  }

  bool release_barrier() {
    int waiting = 0;
    const Fiber* first = nullptr;
    for (const Fiber& f : fibers_) {
      if (f.state != State::barrier) continue;
      ++waiting;
      if (!first) first = &f;
      if (!(first->site == f.site)) {
        error_ = "barrier divergence: threads wait at " + first->site.text() + " and at " + f.site.text();
        return true;
      }
    }
    if (waiting && waiting == n_ - done_ && done_) {
      error_ = std::to_string(done_) + " thread(s) returned, " + std::to_string(waiting) + " wait at " + first->site.text();
      return true;
    }
    if (waiting != n_) return false;
    result_ = votes_;
    votes_ = 0;
    for (Fiber& f : fibers_) f.state = State::run;
    return true;
  }

  std::string deadlock() const {
    std::map<std::string, int> at;
    for (const Fiber& f : fibers_)
      if (f.state != State::done) ++at[std::string(f.what) + " (" + f.site.text() + ")"];
    std::string text = "deadlock: " + std::to_string(done_) + " thread(s) returned";
    for (const auto& [where, count] : at) text += "; " + std::to_string(count) + " thread(s) in " + where;
    return text;
  }

  void yield() {
    ++switches;
    suspend(*me);
  }

  static Stacks& stacks() {
    static thread_local Stacks s;
    return s;
  }

  static void entry() {
    Block* b = current;
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &b->scheduler_stack_, &b->scheduler_stack_size_);
#endif
    (*b->body_)();
    b->me->state = State::done;
    b->yield();
    std::abort();
  }

#if defined(__x86_64__)
  void prepare(Fiber& f) {
    unsigned char* stack = stacks().of(f.linear);
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(stack, Stacks::kSize);      // frames of the last block's thread
#endif
    void** sp = reinterpret_cast<void**>(stack + Stacks::kSize);
    *--sp = nullptr;                  // in the place of a return address: keeps the alignment of the calling convention
    *--sp = reinterpret_cast<void*>(&Block::entry);
    for (int k = 0; k < 6; ++k) *--sp = nullptr;
    f.sp = sp;
  }
  void resume(Fiber& f) {
#ifdef EMU_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stacks().of(f.linear), Stacks::kSize);
#endif
    gptvq_emu_switch(&scheduler_, f.sp);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  void suspend(Fiber& f) {
#ifdef EMU_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(f.state == State::done ? nullptr : &fake, scheduler_stack_, scheduler_stack_size_);
#endif
    gptvq_emu_switch(&f.sp, scheduler_);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }
#else
  void prepare(Fiber& f) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks().of(f.linear);
    f.context.uc_stack.ss_size = Stacks::kSize;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Block::entry, 0);
  }
  void resume(Fiber& f) { swapcontext(&scheduler_, &f.context); }
  void suspend(Fiber& f) { swapcontext(&f.context, &scheduler_); }
#endif
};
inline thread_local Block* Block::current = nullptr;

}  // namespace emu
