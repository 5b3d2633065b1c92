// Threads for the parts of a call.
#pragma once
#include <cstdint>

namespace gptvq {

// Calls work(context) on up to `threads` threads, the calling one included, and returns when all are done.  `work` must take
// its share from a counter of its own: how many threads come to help is left open, and late ones find nothing to do.  While they
// help another caller, this thread does it all.  A `brief` call takes far less than a millisecond, and is one of many: where other
// processes keep its threads from coming in time, such calls do without them for a while.
void run_on_threads(std::int64_t threads, void (*work)(void*), void* context, bool brief);

// torch_parallel_for of PyTorch's stable C interface: body(from, to, context) on its threads, for ranges that make up [begin, end).
using TorchParallelFor = int (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, void (*body)(std::int64_t, std::int64_t, void*),
                                 void* context);

// From now on threads are PyTorch's, which else would compete with ours for the processors; null: ours.  Not while calls run.
void use_threads_of(TorchParallelFor torch);

}  // namespace gptvq
