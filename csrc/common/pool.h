// Threads that outlive a call: a GEMV of a small layer takes less time than starting a thread.
#pragma once
#include <cstdint>

namespace gptvq {

struct Helpers {
  bool wake = true;     // false: only threads that are awake come, as waking one takes the caller 10 us, and it comes late
  bool stay = false;    // the next call is likely to come soon: they stay awake for longer, at the cost of other threads' time
};

// Calls work(context) on up to `threads` threads, the calling one included, and returns when all are done.  `work` must take
// its share from a counter of its own: how many threads come to help is left open, and late ones find nothing to do.  Where the
// pool is busy with another caller, this thread does it all.
void run_on_threads(std::int64_t threads, void (*work)(void*), void* context, Helpers helpers = {});

}  // namespace gptvq
