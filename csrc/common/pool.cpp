#include "common/pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace gptvq {
namespace {

// A worker keeps looking this long before it sleeps: the next layer of a model is usually not far, and waking takes longer.
constexpr std::chrono::microseconds kPatience{30};
constexpr std::int64_t kMostThreads = 256;      // they stay: a slip of the caller's may not fill the process with them

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Ready>
bool look_for(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  do
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  while (std::chrono::steady_clock::now() < end);
  return ready();
}

// Threads that outlive a call.  For one caller at a time.
class Pool {
 public:
  void run(std::int64_t threads, void (*work)(void*), void* context) {
    grow(std::min(threads, kMostThreads) - 1);
    const std::int64_t seats = std::min(threads - 1, workers_);
    work_ = work;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    seats_.store(seats);                // publishes the job
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }     // a worker on its way to sleep sees the seats or hears the call
      wake_.notify_all();
    }
    work(context);
    const std::int64_t taken = seats - seats_.exchange(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) != taken; ++spins)
      if (spins < 4096) relax();
      else std::this_thread::yield();     // more threads than processors: let the last one finish
  }

 private:
  void grow(std::int64_t count) {
    try {
      for (; workers_ < count; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      // no more threads or memory to be had: those there are do it
    }
  }

  void serve() {
    for (;;) {
      if (!look_for([this] { return seats_.load() > 0; })) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [this] { return seats_.load() > 0; });
        sleepers_.fetch_sub(1);
      }
      std::int64_t seats = seats_.load();
      while (seats > 0 && !seats_.compare_exchange_weak(seats, seats - 1)) {}
      if (seats <= 0) continue;
      work_(context_);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<std::int64_t> seats_{0}, done_{0}, sleepers_{0};
  std::int64_t workers_ = 0;
  void (*work_)(void*) = nullptr;
  void* context_ = nullptr;
};

using Clock = std::chrono::steady_clock;

// Where other processes want the processors a thread may come late by milliseconds, for which a brief call cannot wait.  After such a
// wait brief calls compute alone for twenty times as long.
constexpr std::chrono::microseconds kLate{500}, kLatest{20000};
constexpr int kAloneFor = 20;

struct Threads {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  Clock::time_point alone_until{};        // busy's holder's
  TorchParallelFor torch = nullptr;
  Pool pool;
};

// Never destroyed: its threads may still run while the process ends.  A forked child has none of them, nor those of PyTorch's OpenMP,
// which would wait for them forever, and starts a pool anew.  Made when the module is loaded, so that no fork can fall into its making.
Threads* threads_here = [] {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { threads_here = new Threads; });
#endif
  return new Threads;
}();

// -> when this thread's own share was done.
Clock::time_point run_on_threads_of(TorchParallelFor torch, std::int64_t threads, void (*work)(void*), void* context) {
  struct Job {
    void (*work)(void*);
    void* context;
    std::thread::id caller;
    Clock::time_point done;
  } job{work, context, std::this_thread::get_id(), {}};
  const auto body = [](std::int64_t from, std::int64_t to, void* of) {
    Job& job = *static_cast<Job*>(of);
    for (; from < to; ++from) job.work(job.context);
    if (std::this_thread::get_id() == job.caller) job.done = Clock::now();
  };
  if (torch(0, threads, 1, body, &job) != 0) {
    work(context);                        // no threads to be had; what they left is done here
    job.done = Clock::now();
  }
  return job.done;
}

}  // namespace

void run_on_threads(std::int64_t threads, void (*work)(void*), void* context, bool brief) {
  Threads& here = *threads_here;
  if (threads < 2 || here.busy.test_and_set(std::memory_order_acquire)) return work(context);
  const Clock::time_point began = Clock::now();
  if (brief && began < here.alone_until) {
    work(context);
  } else if (here.torch) {
    const Clock::time_point done = run_on_threads_of(here.torch, threads, work, context), end = Clock::now();
    if (brief && end - done > std::max<Clock::duration>(kLate, done - began))
      here.alone_until = end + kAloneFor * std::min<Clock::duration>(end - done, kLatest);
  } else {
    here.pool.run(threads, work, context);
  }
  here.busy.clear(std::memory_order_release);
}

void use_threads_of(TorchParallelFor torch) {
  threads_here->torch = torch;
  threads_here->alone_until = {};
}

}  // namespace gptvq
