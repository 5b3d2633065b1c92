#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#include "common/pool.h"

namespace gptvq {

// Calls work(part) once for every part in [0, parts) on up to `threads` threads, this one included.  Which thread runs a
// part is left open, so a part may not depend on another; then the result does not depend on the number of threads.  The first
// exception ends the call and is thrown here.  `brief`: see run_on_threads.
template <class F>
void parallel_for(std::int64_t parts, std::int64_t threads, F&& work, bool brief = false) {
  struct Job {
    F& work;
    std::int64_t parts;
    std::atomic<std::int64_t> next{0};
    std::mutex failing{};
    std::exception_ptr error{};
  } job{work, parts};
  const auto run = [](void* context) {
    Job& job = *static_cast<Job*>(context);
    try {
      for (std::int64_t part; (part = job.next.fetch_add(1)) < job.parts;) job.work(part);
    } catch (...) {
      std::lock_guard<std::mutex> lock(job.failing);
      if (!job.error) job.error = std::current_exception();
      job.next = job.parts;
    }
  };
  run_on_threads(std::min(parts, threads), run, &job, brief);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace gptvq
